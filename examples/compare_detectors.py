"""Two detectors on the same split: which is better, and is the difference more than chance?

The same from the command line: umiad compare DATA --detectors padim,posgauss --out result
"""

import tempfile

from umiad.comparison import CompareOptions, compare
from umiad.comparison_files import write_comparison
from umiad.phantoms import write_phantoms

data = write_phantoms(tempfile.mkdtemp(), n_normal=40, n_abnormal=10, size=96)
options = CompareOptions(preset="quick", weights="random", size=64, resamples=100)

found = compare(["padim", "posgauss"], data, options=options)
for each in found.against_best("official"):
    print(each.metric, f"{each.first} - {each.second}: {each.value:.3f}", each.ci95, each.verdict)
print("report:", write_comparison(found, data / "comparison"))
