"""verl's actor worker, its FSDP2 engine and the flags of docs/engines.md, on a CPU and in one
process: one call of update_actor on the batch in FOLDER; writes the weights there. Run by
test_verl.py:

    python tests/verl_actor_step.py FOLDER EPOCHS TEMPERATURE FLAGS
"""

import os
import sys
import types
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from tensordict import TensorDict
from torch.distributed.tensor import DTensor

import verl
from verl.plugin.platform import set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA

# The one worker of the group, and the engine that verl has for GPUs alone.
WORKER = {
    "WG_BACKEND": "ray",
    "WORLD_SIZE": "1",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
    "VERL_ENGINE_DEVICE": "cuda",
}


class PlatformCPU(PlatformCUDA):
    """verl has none of its own. What torch.cuda counts of its memory is 0 without a GPU; two
    questions that it would not answer then are answered here."""

    device_name = "cpu"
    answers = {"mem_get_info": lambda: (0, 0), "get_device_name": lambda: "CPU"}
    device_module = types.SimpleNamespace(**vars(torch.cuda) | answers)

    def current_device(self):
        return "cpu"

    def set_allocator_settings(self, settings):
        pass


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def read_flags(flags):
    """As verl.trainer.main_ppo reads them -> its configuration."""
    folder = Path(verl.__file__).parent / "trainer" / "config"
    with initialize_config_dir(str(folder), version_base=None):
        return compose("ppo_trainer", overrides=flags)


def main():
    folder, epochs, temperature, *flags = sys.argv[1:]
    os.environ.update(WORKER)
    set_platform(PlatformCPU())
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
    )
    from verl.utils import tensordict_utils
    from verl.workers.engine_workers import ActorRolloutRefWorker
    from verl.workers.utils.padding import left_right_2_no_padding

    config = read_flags(flags)
    actor = config.actor_rollout_ref.actor
    worker = ActorRolloutRefWorker(config.actor_rollout_ref, role="actor")
    worker.init_model()

    # What verl's trainers send to the worker; the older one takes the padding out first.
    tensors = torch.load(f"{folder}/batch.pt", weights_only=False)
    data = TensorDict(tensors, batch_size=len(tensors["responses"]))
    if not data["responses"].is_nested:
        data = left_right_2_no_padding(data)
    tensordict_utils.assign_non_tensor(
        data,
        calculate_entropy=actor.calculate_entropy,
        global_batch_size=len(data),
        mini_batch_size=len(data),
        epochs=int(epochs),
        seed=0,
        dataloader_kwargs={"shuffle": False},
        temperature=float(temperature),
    )
    worker.update_actor(data)
    state = worker.actor.engine.module.state_dict()
    torch.save({name: whole(tensor) for name, tensor in state.items()}, f"{folder}/weights.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
