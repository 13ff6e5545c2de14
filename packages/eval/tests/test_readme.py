import re
from pathlib import Path


def test_the_code_in_the_readme_runs():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    found = {}
    exec(block, found)
    assert 0.5 < found["distance"] < 2  # 64 (0.1^2 + 0.1^2) and the chance of the draw
    assert 0 <= found["shares"].recall <= 1
    assert abs(found["decibels"] - 46) < 1  # noise of 0.005 in [0, 1]
