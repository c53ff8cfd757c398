"""The code shared by the recurrent layers of Linen and NNX."""
