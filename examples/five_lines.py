"""The main job in a few lines: learn from normal images, score new ones, measure.

With your own data: replace the phantoms by your folder, and weights="random" by weights="imagenet".
"""

import tempfile

import umiad
from umiad.phantoms import write_phantoms

data = write_phantoms(tempfile.mkdtemp(), n_normal=40, n_abnormal=8, size=128)

detector = umiad.build("padim", preset="quick", weights="random", size=128)
model = umiad.fit(detector, data)
for finding in model.score(sorted((data / "abnormal").glob("*.png"))[:3]):
    print(finding.name, f"score {finding.image_score:.3f}", f"p {finding.p_value:.3f}", finding.regions[:1])
print(umiad.evaluate(model, data, n_resamples=50).metrics["det_auroc"])
print("saved", umiad.save(model, data / "model"))
