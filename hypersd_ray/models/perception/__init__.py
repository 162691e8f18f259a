"""Perception models m_I of Eq. 16: instance segmentation whose loss on x'_0 tells how sound its objects are."""
