"""What recipes of small convnets share."""

NINE_NETWORKS = {
    "w75": "width=0.75",
    "w75_d50": "width=0.75,depth=0.5",
    "w75_f50": "width=0.75,ffn=0.5",
    "f50": "ffn=0.5",
    "w50": "width=0.5",
    "w50_d50": "width=0.5,depth=0.5",
    "w50_f50": "width=0.5,ffn=0.5",
    "w50_d50_f50": "width=0.5,depth=0.5,ffn=0.5",
}
"""The sub-networks of the small recipes, beside "full": w75 = 75 % of the channels, d50 = half of the blocks, f50 =
half of the hidden units."""
