"""Networks: the base UNet and its roles, encoders, discriminator, and how adapters are exported. No Ray, no training."""
