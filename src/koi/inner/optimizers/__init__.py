"""The inner optimizers: as pure rules, and as torch has them."""
