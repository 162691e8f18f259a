"""Networks: the base UNet and its roles, encoders, discriminator, how adapters are exported. No Ray, no training."""
