"""A plain PyTorch MMDiT-X, for measuring against and nothing else: the project itself needs no Python.

Reads one JSON request a line from standard input and answers with one line each:
  {"op": "load", "file": PATH, "dtype": "bfloat16"}         weights of a safetensors file (float32 without a dtype)
  {"op": "golden", "file": PATH}                            largest errors on golden inputs and outputs
  {"op": "forward", "inputs": {...}, "calls": N}            seconds of each call, and the velocity
  {"op": "memory"}                                          largest resident set so far, in bytes
  {"op": "lora", "batch": ..., "rank": 16, "checkpointing": true, "calls": 3}    steps of a LoRA over frozen weights
  {"op": "train", "batch": {...}, "calls": N, "rate": R}    seconds and loss of each step of AdamW
Tensors are {"shape": [...], "values": base64 of float32}. Argument: number of threads.
"""

import base64
import json
import math
import mmap
import re
import resource
import struct
import sys
import time

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

PREFIX = "model.diffusion_model."
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path, dtype=torch.float32, prefix=""):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in DTYPES or not name.startswith(prefix):
            continue
        count = math.prod(entry["shape"])
        offset = 8 + length + entry["data_offsets"][0]
        flat = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]], count=count, offset=offset)
        tensors[name] = flat.reshape(entry["shape"]).to(dtype, copy=True)
    return tensors


class Mmditx:
    """Weights by the checkpoint's names; sizes follow from their shapes."""

    def __init__(self, tensors):
        self.weights = {name[len(PREFIX) :]: value for name, value in tensors.items() if name.startswith(PREFIX)}
        self.hidden = self.weights["x_embedder.proj.weight"].shape[0]
        self.head_width = self.weights["joint_blocks.0.x_block.attn.ln_q.weight"].shape[0]
        self.depth = len({match[0] for match in map(re.compile(r"joint_blocks\.\d+").match, self.weights) if match})

    def linear(self, name, x):
        return F.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def norm(self, x):
        return F.layer_norm(x, (self.hidden,), eps=1e-6)

    def modulation(self, name, c):
        """Shifts, scales and gates: as many as the layer is wide."""
        joined = self.linear(name + ".adaLN_modulation.1", F.silu(c)).unsqueeze(1)
        return joined.split(self.hidden, dim=-1)

    def query_key_value(self, name, x):
        batch, tokens, _ = x.shape
        q, k, v = self.linear(name + ".qkv", x).view(batch, tokens, 3, -1, self.head_width).unbind(2)
        q = F.rms_norm(q, (self.head_width,), self.weights[name + ".ln_q.weight"], 1e-6)
        k = F.rms_norm(k, (self.head_width,), self.weights[name + ".ln_k.weight"], 1e-6)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def mlp(self, name, x):
        return self.linear(name + ".mlp.fc2", F.gelu(self.linear(name + ".mlp.fc1", x), approximate="tanh"))

    def block(self, layer, x, context, c):
        image_name, context_name = (f"joint_blocks.{layer}.{stream}_block" for stream in ("x", "context"))
        mod = self.modulation(image_name, c)
        context_mod = self.modulation(context_name, c)
        normal = self.norm(x)
        image = self.query_key_value(image_name + ".attn", modulate(normal, *mod[:2]))
        text = self.query_key_value(context_name + ".attn", modulate(self.norm(context), *context_mod[:2]))
        joint = attention(*(torch.cat(pair, dim=2) for pair in zip(text, image)))
        from_text, from_image = joint.split([context.shape[1], x.shape[1]], dim=1)
        x = x + mod[2] * self.linear(image_name + ".attn.proj", from_image)
        if len(mod) == 9:
            second = attention(*self.query_key_value(image_name + ".attn2", modulate(normal, *mod[6:8])))
            x = x + mod[8] * self.linear(image_name + ".attn2.proj", second)
        x = x + mod[5] * self.mlp(image_name, modulate(self.norm(x), *mod[3:5]))
        if len(context_mod) == 2:  # The last block only reads the context.
            return x, context
        context = context + context_mod[2] * self.linear(context_name + ".attn.proj", from_text)
        context = context + context_mod[5] * self.mlp(context_name, modulate(self.norm(context), *context_mod[3:5]))
        return x, context

    def __call__(self, latent, timestep, context, pooled):
        """The velocity [B,C,H,W]; timestep is 1000 * sigma."""
        w = self.weights
        patch = w["x_embedder.proj.weight"].shape[-1]
        x = F.conv2d(latent, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch)
        batch, _, rows, columns = x.shape
        side = math.isqrt(w["pos_embed"].shape[1])
        top, left = (side - rows) // 2, (side - columns) // 2
        positions = w["pos_embed"].view(1, side, side, -1)[:, top : top + rows, left : left + columns]
        x = x.flatten(2).transpose(1, 2) + positions.reshape(1, rows * columns, -1)
        sinusoid = sinusoids(timestep, w["t_embedder.mlp.0.weight"].shape[1]).to(latent.dtype)
        c = self.embedder("t_embedder", sinusoid)
        c = c + self.embedder("y_embedder", pooled)
        context = self.linear("context_embedder", context)
        for layer in range(self.depth):
            x, context = self.block(layer, x, context, c)
        tokens = self.linear("final_layer.linear", modulate(self.norm(x), *self.modulation("final_layer", c)))
        pieces = tokens.view(batch, rows, columns, patch, patch, -1)
        return torch.einsum("bhwpqc->bchpwq", pieces).reshape(batch, -1, rows * patch, columns * patch)

    def embedder(self, name, x):
        return self.linear(name + ".mlp.2", F.silu(self.linear(name + ".mlp.0", x)))


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def sinusoids(timestep, width):
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = timestep[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def timed(call, calls):
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return seconds, result


def golden(model, file):
    tensors = read_safetensors(file)
    errors = {}
    for case in sorted({name.split(".")[0] for name in tensors if name.endswith(".in.latent")}):
        inputs = (tensors[f"{case}.in.{name}"] for name in ("latent", "timestep", "context", "pooled"))
        with torch.inference_mode():
            errors[case] = (model(*inputs) - tensors[f"{case}.out"]).abs().max().item()
    return {"errors": errors}


def forward(model, inputs, calls):
    dtype = model.weights["x_embedder.proj.weight"].dtype
    inputs = {name: value if name == "timestep" else value.to(dtype) for name, value in inputs.items()}
    with torch.inference_mode():
        seconds, velocity = timed(lambda: model(**inputs), calls)
    return {"seconds": seconds, "velocity": to_message(velocity.float())}


class Training:
    """The velocity loss, gradients clipped to a norm of 1, AdamW; everything but the table of positions is trained."""

    def __init__(self, model):
        self.model = model
        self.trained = [value.requires_grad_() for name, value in model.weights.items() if name != "pos_embed"]
        # The fused variant is PyTorch's fastest on a CPU.
        self.optimizer = torch.optim.AdamW(self.trained, fused=True)

    def step(self, latent, noise, sigma, context, pooled):
        level = sigma[:, None, None, None]
        predicted = self.model((1 - level) * latent + level * noise, 1000 * sigma, context, pooled)
        loss = F.mse_loss(predicted, noise - latent)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.item()

    def run(self, batch, calls, rate):
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = []
        seconds, _ = timed(lambda: losses.append(self.step(**batch)), calls)
        return {"seconds": seconds, "losses": losses}


class LoraTraining:
    """A LoRA of float32 on the attention and MLP layers of all blocks, over frozen weights."""

    def __init__(self, model, rank, checkpointing):
        self.model, self.checkpointing = model, checkpointing
        self.adapters = {}
        for name, weight in model.weights.items():
            weight.requires_grad_(False)
            if re.search(r"_block\.(attn2?\.(qkv|proj)|mlp\.fc[12])\.weight$", name):
                down = (torch.rand(rank, weight.shape[1]) * 2 - 1) / weight.shape[1] ** 0.5
                up = torch.zeros(weight.shape[0], rank)
                self.adapters[name[: -len(".weight")]] = (down.requires_grad_(), up.requires_grad_())
        self.trained = [matrix for pair in self.adapters.values() for matrix in pair]
        self.optimizer = torch.optim.AdamW(self.trained, fused=True)
        base = model.linear

        def linear(name, x):
            result = base(name, x)
            if name not in self.adapters:
                return result
            down, up = self.adapters[name]
            return result + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))

        model.linear = linear
        if checkpointing:
            plain = model.block
            model.block = lambda *inputs: torch.utils.checkpoint.checkpoint(plain, *inputs, use_reentrant=False)

    def step(self, latent, noise, sigma, context, pooled):
        level = sigma[:, None, None, None]
        noisy = (1 - level) * latent + level * noise
        dtype = self.model.weights["x_embedder.proj.weight"].dtype
        predicted = self.model(noisy.to(dtype), 1000 * sigma, context.to(dtype), pooled.to(dtype)).float()
        loss = F.mse_loss(predicted, noise - latent)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.item()


def to_message(tensor):
    data = bytes(tensor.contiguous().flatten().untyped_storage())
    return {"shape": list(tensor.shape), "values": base64.b64encode(data).decode()}


def from_messages(tensors):
    return {
        name: torch.frombuffer(bytearray(base64.b64decode(entry["values"])), dtype=torch.float32).reshape(entry["shape"])
        for name, entry in tensors.items()
    }


def main():
    torch.set_num_threads(int(sys.argv[1]))
    model = training = None

    def answer(request):
        nonlocal model, training
        op = request["op"]
        if op == "load":
            model = training = None
            dtype = getattr(torch, request.get("dtype", "float32"))
            model = Mmditx(read_safetensors(request["file"], dtype, PREFIX))
            return {}
        if op == "golden":
            return golden(model, request["file"])
        if op == "forward":
            return forward(model, from_messages(request["inputs"]), request["calls"])
        if op == "memory":
            return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if op == "lora":
            training = training or LoraTraining(model, request["rank"], request["checkpointing"])
            batch, losses = from_messages(request["batch"]), []
            seconds, _ = timed(lambda: losses.append(training.step(**batch)), request["calls"])
            return {"seconds": seconds, "losses": losses}
        if op == "train":
            training = training or Training(model)
            return training.run(from_messages(request["batch"]), request["calls"], request["rate"])
        raise ValueError(f"unknown request {op}")

    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


main()
