"""An ablation is a choice of parts by name: the same call, other parts (see docs/architecture.md)."""

import tempfile

import umiad
from umiad.phantoms import write_phantoms

data = write_phantoms(tempfile.mkdtemp(), n_normal=20, n_abnormal=6, size=64)
variants = {
    "full": {},
    "no edges": {"edge": "none", "aggregate": "ignore"},
    "no fusion": {"fusion": "none"},
}
for name, parts in variants.items():
    settings = {**parts, "blocks": 2, "training": {"epochs": 2}}
    detector = umiad.build("egmf", preset="paper", weights="random", size=64, settings=settings)
    model = umiad.fit(detector, data)
    print(
        f"{name:10} -log p of held-out normals: {model.info['holdout_nats_per_dim']:.3f} nats per dimension"
    )
