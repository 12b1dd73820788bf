"""The mathematics of the layers: plain torch definitions (`reference`), imported by `model`."""
