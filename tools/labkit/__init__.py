"""What `tools/lab` does: a VM with a stock Debian kernel and real vDPA devices. Standard library only."""
