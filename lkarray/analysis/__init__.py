"""What a user holds, and what may be asked of it: losses, gradients, audits, hierarchies."""
