"""``skd bench --device cuda``: what is measured, on which device, how it is sampled, and what it is held against."""
