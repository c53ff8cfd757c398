"""What the recurrent layers of Linen and NNX share."""
