"""A process that compiles one network once and measures it: requests and answers are lines of JSON."""

from fusion.bench.answers import answer_requests
from fusion.bench.compile_settings import CompileSettings
from fusion.bench.model_case import ModelCase


def make_bench(request: dict):
    """The network and the compiler that a first request names."""
    import torch

    from fusion.bench.compile_bench import CompileBench

    torch.backends.cudnn.benchmark = True
    settings = CompileSettings(**request["settings"])
    return CompileBench(ModelCase(**request["case"]), request["engine"], settings)


if __name__ == "__main__":
    answer_requests(make_bench)
