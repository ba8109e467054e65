"""Measurements of skd against plain PyTorch: correctness first, then time, bandwidth and memory."""

from skd.bench.config import BenchConfig

__all__ = ["BenchConfig", "run"]


def run(config: BenchConfig) -> int:
    """Measures what the configuration asks for, prints the tables and writes the rows.

    Returns:
        The exit status: 0; 1 if a result was wrong or ``expect_ratio`` was missed; 2 for a configuration that
        cannot be carried out (a sentence on stderr says why); 130 after Ctrl-C, when nothing is written
        (on CUDA: what was measured before it).
    """
    if config.device == "cuda":
        from skd.bench.cuda import runner
    else:
        from skd.bench import runner

    return runner.run(config)
