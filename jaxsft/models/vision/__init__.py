"""Models of images: three networks (`tower`, `residual`, `depthwise`), and a thin file for each kind of checkpoint.

They keep to the contract of `models.Model`: pixels [B, H, W, C] stand where tokens do, and `features` is the one vector
of an image as if it were one token, [B, 1, D]. So whatever scores tokens scores images, see `classifier`.
"""
