"""Score NumPy arrays, no files involved: what a pipeline that has its own reader does."""

import numpy as np

import umiad

rng = np.random.default_rng(0)
normal = rng.normal(0.5, 0.05, size=(24, 96, 96)).clip(0, 1)  # [N,H,W], float means 0..1
model = umiad.fit(umiad.build("padim", preset="quick", weights="random", size=64), normal)

strange = normal[0].copy()
strange[30:50, 40:60] = 1.0
for name, image in {"normal": normal[1], "strange": strange}.items():
    [finding] = model.score(image)
    print(name, f"score {finding.image_score:.2f}", "unusual" if finding.above_threshold else "usual")
