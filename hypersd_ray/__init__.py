"""Hyper-SD on Ray: trajectory segmented consistency distillation, feedback and one-step enhancement."""
