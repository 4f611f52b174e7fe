import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import run_folders
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))  # and runs
