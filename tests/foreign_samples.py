"""Logs of other tools, written by hand in the form that the tools have."""

# ruff: noqa: E501  the lines of logs are long

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class Sample:
    """How a tool writes losses, and what is to be read from it: the clock of each row, and the digits of a loss."""

    write: Callable[[Sequence[float]], str]
    clock: Callable[[int], float] = lambda row: row
    digits: int = 4
    validations: int = 0  # how many
    gradient: float | None = None
    rate: float | None = None
    words: tuple[str, ...] = ()
    exponent: bool = False  # digits after the point of a number like 4.42E+01
    counted: bool = False  # whether the clock is the number of the row, which damage changes for the rows after it


def by(template, start=0, before="", after="", **fields):
    """Lines of a template with {i} and {x}."""

    def write(values):
        return before + "".join(template.format(i=i, x=x, n=len(values)) for i, x in enumerate(values, start)) + after

    return write


def with_evals(row, val, every=50, start=0, before=""):
    def write(values):
        text = before
        for i, x in enumerate(values, start):
            if i % every == 0:
                text += val.format(i=i, x=x + 0.1)
            text += row.format(i=i, x=x, n=len(values))
        return text

    return write


def evals_after(row, val, every=50, start=0, before="", after=""):
    def write(values):
        text = before
        for i, x in enumerate(values, start):
            text += row.format(i=i, x=x, e=i / 100, n=len(values))
            if (i + 1 - start) % every == 0:
                text += val.format(i=i, x=x + 0.1, e=i / 100)
        return text + after

    return write


def lightning(values):
    rows = ["epoch,lr-AdamW,step,train_loss_epoch,train_loss_step,val_loss"]
    for i, x in enumerate(values):
        rows.append(f"{i // 50},0.001,{i},,{x:.4f},")
        if i % 50 == 49:
            rows.append(f"{i // 50},,{i},,,{x + 0.1:.4f}")
            rows.append(f"{i // 50},,{i},{x + 0.2:.4f},,")
    return "\n".join(rows) + "\n"


def long_csv(values):
    rows = [f"train,{i},{x:.4f}" for i, x in enumerate(values)]
    rows += [f"val,{i},{values[i] + 0.1:.4f}" for i in range(49, len(values), 50)]
    return "split,step,loss\n" + "\n".join(rows) + "\n"


def mlperf(values):
    def event(key, value, **metadata):
        content = {"namespace": "", "time_ms": 1, "event_type": "POINT_IN_TIME", "key": key, "value": value,
                   "metadata": {"file": "train.py", "lineno": 7, **metadata}}  # fmt: skip
        return f":::MLLOG {json.dumps(content)}\n"

    text = event("global_batch_size", 256)
    for i, x in enumerate(values):
        text += event("train_loss", round(x, 4), samples_count=256 * i)
        if i % 50 == 49:
            text += event("eval_loss", round(x + 0.1, 4), samples_count=256 * i)
    return text + event("run_stop", None, status="success")


def olmo(values):
    text = "2024-05-01 12:00:00.100\thost:0\tolmo.train:500\tINFO\tStarting training\n"
    for i, x in enumerate(values, 1):
        text += (
            f"2024-05-01 12:00:01.{i % 1000:03d}\thost:0\tolmo.train:934\tINFO\t[step={i}/{len(values)},epoch=0]\n"
            f"    optim/total_grad_norm=1.25\n    train/CrossEntropyLoss={x:.4f}\n    train/Perplexity=84,100\n"
            f"    throughput/total_tokens=4,194,304\n    throughput/device/tokens_per_second=9,999\n"
        )
    return text


def olmo_prefixed(values):
    prefix = "2024-05-01T12:00:00Z node7 [rank0] INFO "
    return "".join(
        f"{prefix}[step={i}/{len(values)}]\n{prefix}    train/CrossEntropyLoss={x:.4f}\n{prefix}    optim/grad_norm=0.5\n"
        for i, x in enumerate(values, 1)
    )


def composer(values):
    return "".join(
        f"[epoch=1][batch={i}/{len(values)}]:\n\t Train time/batch: {i}\n\t Train time/token: {i * 4096}\n"
        f"\t Train loss/train/total: {x:.4f}\n\t Train throughput/batches_per_sec: 1.5\n"
        for i, x in enumerate(values)
    )


def keras_console(values):
    text = ""
    for i, x in enumerate(values, 1):
        text += f"Epoch {i}/{len(values)}\n\x1b[1m 1/50\x1b[0m \x1b[32m━\x1b[0m\x1b[37m━━━\x1b[0m \x1b[1m5s\x1b[0m 90ms/step - loss: 9.0000"
        text += f"\r\x1b[1m50/50\x1b[0m \x1b[32m━━━━\x1b[0m \x1b[1m1s\x1b[0m 2ms/step - accuracy: 0.5 - loss: {x:.4f} - val_loss: {x + 0.1:.4f}\n"
    return text


def fairseq_json(values):
    text = ""
    for i, x in enumerate(values, 1):
        row = {"epoch": 1, "update": round(i / 100, 3), "loss": f"{x:.4f}", "ppl": "9", "num_updates": str(i * 10),
               "lr": "0.0005", "gnorm": "1.5", "clip": "0", "loss_scale": "64", "wall": "5"}  # fmt: skip
        text += f"2023-05-01 12:00:00 | INFO | train_inner | {json.dumps(row)}\n"
        if i % 50 == 0:
            row = {"epoch": 1, "valid_loss": f"{x + 0.1:.4f}", "valid_num_updates": str(i * 10)}
            text += f"2023-05-01 12:00:00 | INFO | valid | {json.dumps(row)}\n"
            row = {"epoch": 1, "train_loss": f"{x + 1:.4f}", "train_num_updates": str(i * 10)}
            text += f"2023-05-01 12:00:00 | INFO | train | {json.dumps(row)}\n"
    return text


def imagenet(values):
    """PyTorch's example for ImageNet: batches are counted again in each epoch."""
    text = ""
    for i, x in enumerate(values):
        epoch, batch = divmod(i, 50)
        text += (
            f"Epoch: [{epoch}][{batch * 10:4d}/500]\tTime  0.15 ( 0.20)\tData  0.00 ( 0.01)\t"
            f"Loss {x:.4e} (6.9000e+00)\tAcc@1   1.00 (  0.50)\n"
        )
        if batch == 49:
            text += f"Test: [ 0/50]\tTime  0.15 ( 0.20)\tLoss {x + 0.1:.4e} (6.9e+00)\tAcc@1   1.00 (  0.50)\n"
    return text


def mnist(values):
    text = ""
    for i, x in enumerate(values):
        epoch, batch = divmod(i, 50)
        text += f"Train Epoch: {epoch + 1} [{batch * 640}/32000 ({2 * batch}%)]\tLoss: {x:.6f}\n"
        if batch == 49:
            text += f"\nTest set: Average loss: {x + 0.1:.4f}, Accuracy: 9000/10000 (90%)\n\n"
    return text


def quickstart(values):
    """PyTorch's tutorial: the samples of an epoch are counted again in the next one."""
    text = ""
    for i, x in enumerate(values):
        if i % 50 == 0:
            text += f"Epoch {i // 50 + 1}\n-------------------------------\n"
        text += f"loss: {x:>7f}  [{i % 50 * 6400 + 64:>5d}/320000]\n"
        if i % 50 == 49:
            text += "Test Error: \n Accuracy: 50.9%, Avg loss: 2.150000 \n\n"
    return text


def litgpt(values):
    return "".join(
        f"Epoch {i // 100 + 1} | iter {i + 1} step {i + 1} | loss train: {x:.3f}, "
        f"val: {f'{x + 0.1:.3f}' if i % 50 == 49 else 'n/a'} | iter time: 358.12 ms (step)\n"
        for i, x in enumerate(values)
    )


def fastai_console(values):
    rows = [f"{i:<9} {x:.6f}    {x + 0.1:.6f}    0.512000  00:10     " for i, x in enumerate(values)]
    return "\n".join(["epoch     train_loss  valid_loss  accuracy  time    ", *rows]) + "\n"


def markdown(values):
    rows = [f"| {x:.4f}        | {i / 50:.2f}  | {i * 10}  | {x + 0.1:.4f}          |" for i, x in enumerate(values, 1)]
    return "\n".join(["### Training results", "", "| Training Loss | Epoch | Step | Validation Loss |",
                      "|:-------------:|:-----:|:----:|:---------------:|", *rows]) + "\n"  # fmt: skip


def yolo(values):
    head = "                  epoch,         train/loss,      metrics/mAP50(B),           val/loss,             lr/pg0"
    return (
        head
        + "\n"
        + "".join(f"{i:23d},{x:20.5f},{0.5:22.5f},{x + 0.1:19.5f},{0.01:19.5f}\n" for i, x in enumerate(values))
    )


def jsonl(*keys, **fixed):
    step, loss = keys

    def write(values):
        return "".join(json.dumps({step: i, loss: round(x, 4), **fixed}) + "\n" for i, x in enumerate(values))

    return write


def jsonl_splits(values):
    text = ""
    for i, x in enumerate(values):
        text += json.dumps({"split": "train", "step": i, "loss": round(x, 4)}) + "\n"
        if i % 50 == 49:
            text += json.dumps({"split": "val", "step": i, "loss": round(x + 0.1, 4)}) + "\n"
    return text


def trainer_console(quoted, bars):
    def write(values):
        text = "  0%|          | 0/300 [00:00<?, ?it/s]" if bars else ""
        source = random.Random(1)
        for i, x in enumerate(values, 1):
            quote = "'" if quoted else ""
            row = {"loss": f"{x:.4f}", "grad_norm": "0.25", "learning_rate": "1e-05", "epoch": f"{i / 100:.2f}"}
            line = "{" + ", ".join(f"'{name}': {quote}{value}{quote}" for name, value in row.items()) + "}"
            if bars:
                line = f"\r  1%|▏         | {i}/300 [00:01<00:5{source.randrange(9)}, 9.1it/s]\r{' ' * 40}\r{line}"
            text += line + "\n"
            if i % 50 == 0:
                text += (
                    "{" + f"'eval_loss': {quote}{x + 0.1:.4f}{quote}, 'eval_runtime': 1.0, 'epoch': {i / 100}" + "}\n"
                )
        return text + "{'train_runtime': 12.5, 'train_samples_per_second': 3.0, 'train_loss': 9.9, 'epoch': 3.0}\n"

    return write


TITAN = (
    "[rank0]:\x1b[38;5;4m[titan] 2025-02-01 10:00:00,123 - root - INFO - \x1b[31mstep: {i:2}  \x1b[32mloss: {x:7.4f}  "
    "\x1b[38;5;208mgrad_norm: {g:7.4f}  \x1b[38;5;4mmemory:  1.04GiB(1.10%)  \x1b[34mtps: 9,101  \x1b[36mtflops: 1.20  "
    "\x1b[35mmfu: 0.12%\x1b[39m\n"
).replace("{g:7.4f}", " 1.5000")

MEGATRON = (
    " [2024-05-01 12:00:00] iteration {i:8d}/     300 | consumed samples: {i:12d} | elapsed time per iteration (ms): 93.5 | "
    "learning rate: 1.500000E-04 | global batch size:    32 | lm loss: {x:.6E} | loss scale: 1.0 | grad norm: 1.250 | "
    "number of skipped iterations:   0 | number of nan iterations:   0 |\n"
)

SAMPLES = {
    "trainer.log": Sample(trainer_console(quoted=False, bars=False), lambda i: (i + 1) / 100, validations=6, gradient=0.25, rate=1e-5),
    "trainer_quoted.log": Sample(trainer_console(quoted=True, bars=True), lambda i: (i + 1) / 100, validations=6, gradient=0.25, rate=1e-5),
    "lightning.csv": Sample(lightning, validations=6, rate=0.001),
    "long.csv": Sample(long_csv, validations=6),
    "splits.jsonl": Sample(jsonl_splits, validations=6),
    "main.log": Sample(with_evals("s:{i} trl:{x:.4f} lr:0.000001 norm:1.50\n", "s:{i} tel:{x:.4f}\ns:{i} eval:0.25\n"), validations=6, gradient=1.5, rate=1e-6),
    "log.txt": Sample(with_evals("{i} train {x:.6f}\n", "{i} val {x:.4f}\n{i} hella 0.2500\n"), digits=6, validations=6),
    "olmo.log": Sample(olmo, lambda i: i + 1, gradient=1.25),
    "olmo_prefixed.log": Sample(olmo_prefixed, lambda i: i + 1, gradient=0.5),
    "composer.log": Sample(composer),
    "megatron.log": Sample(
        evals_after(MEGATRON, " validation loss at iteration {i} | lm loss value: {x:.6E} | lm loss PPL: 9.123456E+00 | \n", start=1, before="using world size: 8\n"),
        lambda i: i + 1, digits=6, exponent=True, validations=6, gradient=1.25, rate=1.5e-4),
    "megatron_dash.log": Sample(by(MEGATRON.replace("lm loss", "lm-loss"), 1), lambda i: i + 1, digits=6, exponent=True),
    "fairseq.log": Sample(
        evals_after("2023-05-01 12:00:00 | INFO | train_inner | epoch 001: {i:5d} / 2952087 loss={x:.3f}, nll_loss=1.2, ppl=9, num_updates={i}, lr=0.0005, gnorm=1.5, loss_scale=64\n",
                    "| epoch 001 | valid on 'valid' subset | loss {x:.3f} | nll_loss 1.0 | num_updates {i}\n| epoch 001 | loss 99.0 | nll_loss 9 | num_updates {i} | loss_scale 0.5\n", start=1),
        lambda i: i + 1, digits=3, validations=6, gradient=1.5, rate=0.0005),
    "fairseq_epochs.log": Sample(by("| epoch {i:03d} | loss {x:.3f} | nll_loss 3.1 | ppl 9.1 | num_updates {i}00 | lr 0.0003 | gnorm 1.5 | clip 0% | loss_scale 0.5\n", 1), lambda i: (i + 1) * 100, digits=3),
    "fairseq_json.log": Sample(fairseq_json, lambda i: (i + 1) * 10, validations=6, gradient=1.5),
    "mlperf.log": Sample(mlperf, lambda i: 256 * i, validations=6),
    "titan.log": Sample(by(TITAN, 1), lambda i: i + 1, gradient=1.5),
    "pairs.txt": Sample(by("{i} {x:.4f}\n")),
    "pairs.csv": Sample(by("{i}, {x:.4f}, 0.1\n")),
    "single.txt": Sample(by("{x:.4f}\n"), counted=True),
    "mlflow": Sample(by("17000000{i:05d} {x:.4f} {i}\n")),
    "keras.csv": Sample(by("{i},0.5,{x:.4f},0.5,2.9\n", before="epoch,accuracy,loss,val_accuracy,val_loss\n"), validations=300),
    "keras.log": Sample(keras_console, lambda i: i + 1, validations=300),
    "fastai.csv": Sample(by("{i},{x:.4f},2.9,0.51,00:10\n", before="epoch,train_loss,valid_loss,accuracy,time\n"), validations=300),
    "fastai.txt": Sample(fastai_console, digits=6, validations=300),
    "results.csv": Sample(yolo, digits=5, validations=300, rate=0.01),
    "reversed.log": Sample(by("{x:.2f} loss at iter {i}\n"), digits=2),
    "nanogpt.log": Sample(with_evals("iter {i}: loss {x:.4f}, time 12.50ms, mfu 3.10%\n", "step {i}: train loss 9.9, val loss {x:.4f}\n"), validations=6),
    "nanogpt_evals.log": Sample(by("step {i}: train loss {x:.4f}, val loss 4.2000\n"), validations=300),
    "trainer_log.jsonl": Sample(jsonl("current_steps", "loss", total_steps=300, lr=0.1, epoch=0.5), rate=0.1),
    "deepspeed.log": Sample(by("[2023-05-01 12:00:00,123] [INFO] [logging.py:96:log_dist] [Rank 0] step={i}, skipped=0, lr=[0.001], mom=[(0.9, 0.95)]\nsteps: {i} loss: {x:.4f} iter time (s): 0.512 samples/sec: 60.1\n")),
    "bar.log": Sample(by("\rEpoch 0:  10%|█  | {i}/300 [00:01<00:10, 9.3it/s, v_num=0, train_loss={x:.4f}]")),
    "nanodo.log": Sample(by("I0501 12:00:00.123456 140 logging_writer.py:48] [{i}] learning_rate=0.001, loss={x:.4f}\n"), rate=0.001),
    "maxtext.log": Sample(by("completed step: {i}, seconds: 1.012, TFLOP/s/device: 51.1, Tokens/s/device: 800.1, total_weights: 4096, loss: {x:.4f}\n")),
    "torchtune.txt": Sample(by("Step {i} | loss:{x:.4f} lr:2e-05 tokens_per_second_per_gpu:312.1 \n"), rate=2e-5),
    "lingua.jsonl": Sample(jsonl("global_step", "loss/out", **{"optim/grad_norm": 0.5, "optim/lr": 0.01, "speed/wps": 9.0}), gradient=0.5, rate=0.01),
    "litgpt.log": Sample(litgpt, lambda i: i + 1, digits=3, validations=6),
    "modded.log": Sample(with_evals("step:{i}/{n} train_loss:{x:.4f} train_time:100ms step_avg:10.5ms\n", "step:{i}/300 val_loss:{x:.4f} train_time:100ms step_avg:10.5ms\n"), validations=6),
    "imagenet.log": Sample(imagenet, lambda i: i * 10, exponent=True, validations=6),
    "mnist.log": Sample(mnist, lambda i: i * 640, digits=6, validations=6),
    "card.md": Sample(markdown, lambda i: (i + 1) * 10, validations=300),
    "nested.jsonl": Sample(lambda v: "".join(json.dumps({"step": i, "train": {"loss": round(x, 4)}}) + "\n" for i, x in enumerate(v))),
    "tensorboard.csv": Sample(by("1700000000.1,{i},{x:.4f}\n", before="Wall time,Step,Value\n")),
    "tensorboard.json": Sample(lambda v: json.dumps([[1.7e9 + i, i, round(x, 4)] for i, x in enumerate(v)])),
    "history.json": Sample(lambda v: json.dumps({"loss": [round(x, 4) for x in v], "val_loss": [2.0] * len(v)}), validations=300, counted=True),
    "melted.csv": Sample(by("{i},lr,0.5\n{i},train/loss,{x:.4f}\n", before="step,metric,value\n")),
    "detectron.log": Sample(by("[05/01 12:00:00 d2.utils.events]:  eta: 0:10:00  iter: {i}  total_loss: {x:.4f}  loss_cls: 0.5  loss_box_reg: 0.2  time: 0.5  lr: 0.001  max_mem: 2000M\n"), rate=0.001),
    "mmengine.log": Sample(by("2023/05/01 12:00:00 - mmengine - INFO - Iter(train) [{i:5d}/  300]  lr: 1.0e-02  eta: 0:10:00  time: 0.3  memory: 7000  loss: {x:.4f}  decode.loss_ce: 0.5\n"), rate=0.01),
    "opennmt.log": Sample(by("[2023-05-01 12:00:00,123 INFO] Step {i}/  300; acc: 10.1; ppl: 9.1; xent: {x:.4f}; lr: 0.00010; sents: 5000; 100 sec;\n"), rate=1e-4),
    "tutorial.log": Sample(lambda v: "".join(f"[{i // 50 + 1}, {i % 50 * 2000 + 2000:5d}] loss: {x:.3f}\n" for i, x in enumerate(v)), lambda i: 2000 * (i + 1), digits=3),
    "estimator.log": Sample(by("INFO:tensorflow:loss = {x:.4f}, step = {i} (1.234 sec)\nINFO:tensorflow:global_step/sec: 83.1\n")),
    "average.csv": Sample(by("{i};{x:.4f};0.1\n", before="Iteration;Average Loss;Time per step\n")),
    "tabs.tsv": Sample(by("{i}\t{x:.4f}\n", before="# step\tloss\n")),
    "steps.log": Sample(lambda v: "".join(f"Epoch [{i // 50 + 1}/6], Step [{i % 50 * 100 + 100}/5000], Loss: {x:.4f}\n" for i, x in enumerate(v)), lambda i: 100 * (i + 1)),
    "quickstart.log": Sample(quickstart, lambda i: i * 6400 + 64, digits=6),
    "epochs.log": Sample(by("Epoch: {i:02} | Time: 0m 5s\n\tTrain Loss: {x:.3f} | Train PPL:   9.2\n\t Val. Loss: 3.000 |  Val. PPL:   9.9\n"), digits=3, validations=300),
    "flax.log": Sample(by("I0501 12:00:00.1 14 train.py:100] train epoch: {i}, loss: {x:.4f}, accuracy: 50.00\nI0501 12:00:00.1 14 train.py:105] eval epoch: {i}, loss: 3.0, accuracy: 50.00\n"), validations=300),
    "darknet.log": Sample(by("{i}: 9.900000, {x:.6f} avg loss, 0.001000 rate, 3.300000 seconds, 640 images\n"), digits=6),
    "boosting.log": Sample(by("[{i}]\ttrain-logloss:{x:.5f}\teval-logloss:3.00000\n"), digits=5, validations=300),
    "olmo_core.log": Sample(by("2024-11-01 12:00:00.123\thost\t0\tolmo_core.train:88\tINFO\t[step={i}/1000,epoch=1,eta=1 hour]\n    optim/total grad norm=1.5\n    train/CE loss={x:.3f}\n    throughput/device/TPS=10,000\n"), digits=3, gradient=1.5),
    "diffusers.log": Sample(by("\rSteps:  1%|▏ | {i}/1000 [00:10<10:00,  1.0it/s, lr=0.0001, step_loss={x:.4f}]"), rate=1e-4),
    "nemo.log": Sample(by("Training epoch 0, iteration {i}/999 | lr: 2e-05 | global_batch_size: 8 | global_step: {i} | reduced_train_loss: {x:.3f} | train_step_timing in s: 0.15\n"), digits=3, rate=2e-5),
    "caffe.log": Sample(by("I0101 12:00:00.1 123 solver.cpp:228] Iteration {i} (2.3 iter/s, 43.1s/100 iters), loss = {x:.4f}\nI0101 12:00:00.1 123 solver.cpp:244]     Train net output #0: loss = 9.0 (* 1 = 9.0 loss)\n")),
    "train_val.csv": Sample(by("{i},{x:.4f},3\n", before="step,train,val\n"), validations=300),
    "nested.log": Sample(by("{i}: {{'train': {{'loss': {x:.4f}, 'n': 3}}, 'step': {i}, 'val': {{'loss': 3.0}}}}\n"), validations=300),
    "sentences.txt": Sample(by("Training: step {i} of 300, loss is {x:.4f}, lr was 0.001\n"), rate=0.001),
    "tuples.txt": Sample(by("({i}, {x:.4f})\n")),
    "losses.json": Sample(lambda v: json.dumps([round(x, 4) for x in v]), counted=True),
    "units.csv": Sample(by("{i},{x:.4f},0.5\n", before="Step,Loss (nats),Time (s)\n")),
    "wikitext.log": Sample(lambda v: "".join(f"| epoch {i // 50:3d} | {i % 50 * 200:5d}/10000 batches | lr 20.00 | ms/batch 10.00 | loss {x:5.3f} | ppl 9.00\n" for i, x in enumerate(v)), lambda i: i * 200, digits=3, rate=20.0),
}  # fmt: skip
