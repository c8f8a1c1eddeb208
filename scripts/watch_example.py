"""A training loop that is not stabrun's, watched: a small GPT on the embedded text, at a learning rate of your choice.

python scripts/watch_example.py runs/watched --lr 0.1
stabrun report runs/watched
"""

import argparse
import lzma
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stabrun

TEXT = Path(stabrun.__file__).parent / "data" / "text" / "kjv.txt.xz"
WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 64, 4, 4, 128, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).chunk(3, -1))
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.lm_head(self.ln_f(x))
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="directory of the record")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--sites", nargs="+", help="names of sites, or globs of module paths; all by default")
    words = parser.parse_args()
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(lzma.decompress(TEXT.read_bytes())), dtype=torch.uint8).long()
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), words.lr)
    watch = stabrun.watch(model, words.out, every=2, steps=words.steps, sites=words.sites, on_verdict="stop")
    for step in range(words.steps):
        optimizer.param_groups[0]["lr"] = words.lr * min(1.0, (step + 1) / 40)
        batch = torch.stack([text[i : i + CONTEXT + 1] for i in torch.randint(len(text) - CONTEXT, (BATCH,)).tolist()])
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        verdict = watch.step(loss=loss, tokens=BATCH * CONTEXT)
        optimizer.zero_grad()
        if step % 100 == 99:
            torch.save(model.state_dict(), path := Path(words.out) / f"step_{step + 1}.pt")
            watch.saved(path)
        if watch.stopped:
            break
    watch.close()
    print(f"{verdict.verdict} ({verdict.reason}) up to step {verdict.horizon}")


if __name__ == "__main__":
    main()
