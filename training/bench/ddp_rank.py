"""One rank of the benchmark `ddp`: python -m training.bench.ddp_rank CASE.json-text OUTPUT."""

import json
import sys
from pathlib import Path

from training import distributed
from training.bench.ddp import Case, measure_rank
from training.run_dir import write_json


def main() -> None:
    """Measures; rank 0 writes the result."""
    case, output = Case(**json.loads(sys.argv[1])), Path(sys.argv[2])
    result = measure_rank(case)
    if distributed.rank() == 0:
        write_json(output, result)
    distributed.barrier()
    distributed.leave(0)


if __name__ == "__main__":
    main()
