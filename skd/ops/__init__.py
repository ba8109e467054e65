"""Operations: one file each, with its torch.library schema, fake, autograd and choice of backend."""
