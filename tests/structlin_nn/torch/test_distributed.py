"""DDP and FSDP2 on two processes: losses, gradients and parameters of one."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def worker():
    """The workers' module; importlib mode of pytest puts no test folder on the path."""
    path = Path(__file__).with_name("distributed_worker.py")
    spec = importlib.util.spec_from_file_location("distributed_worker", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.path.insert(0, str(path.parent))  # the processes that are spawned import it by name
    yield module
    sys.path.remove(str(path.parent))
    del sys.modules[spec.name]


def alone(worker, kind):
    torch.manual_seed(0)
    model = worker.make_model()
    initial = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return {"initial": initial, **worker.train(model, *worker.data(), lambda loss: loss, kind == "fsdp_muon")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp_meta", "fsdp_muon"])
def test_two_processes_do_what_one_does(worker, kind, tmp_path):
    wanted = alone(worker, kind)
    multiprocessing.spawn(worker.run, (2, kind, str(tmp_path)), nprocs=2)
    for rank in range(2):
        result = torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True)
        torch.testing.assert_close(result["losses"], wanted["losses"], rtol=1e-5, atol=1e-6)
        for what in ("gradients", "parameters"):
            found = {name.removeprefix("module."): value for name, value in result[what].items()}
            assert found.keys() == wanted[what].keys()
            for name, value in wanted[what].items():
                torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        if kind != "ddp":
            assert result["sharded"]
            for name, value in wanted["initial"].items():
                assert torch.equal(result["initial"][name], value), name
