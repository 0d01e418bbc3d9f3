"""LoRA adapters: Koi's start against PEFT's, and a file that loads without Koi.

A sentence encoder is tuned to new intents of CLINC150 from four starts of its adapters: the usual
one, PEFT's two that look at weights (PiSSA) or data (EVA), and one that Koi has learned:
`python examples/adapters.py data_full.json`
"""

import sys

import torch
from intents import (
    ADAM,
    ITERATIONS,
    NUM_TASKS,
    NUM_TRIALS,
    SETTINGS,
    SHOTS,
    WAYS,
    Intents,
    measure,
    read_intents,
)
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights

from koi import Koi
from koi.fewshot import Episodes


def adapted(num_ways, training, start):
    """The encoder with adapters that start in one of PEFT's ways, and a head that is learned."""
    config = LoraConfig(
        lora_alpha=16,
        target_modules=["query", "value"],
        modules_to_save=["head"],
        init_lora_weights=start,
        eva_config=EvaConfig() if start == "eva" else None,
    )
    model = Intents(num_ways, training, adapters=False)
    model = get_peft_model(model, config, low_cpu_mem_usage=start == "eva")
    if start == "eva":  # the main directions of what enters each layer, on the training intents
        classes = torch.arange(len(training)).repeat(8)
        hidden = training.take(classes, torch.arange(8).repeat_interleave(len(training)))
        initialize_lora_eva_weights(
            model,
            hidden.split(len(training)),
            forward_fn=lambda model, hidden: model(hidden),
            prepare_model_inputs_fn=lambda hidden, config: hidden.any(-1),  # no padding
            prepare_layer_inputs_fn=lambda layer_input, used, name: layer_input[0][used],
            show_progress_bar=False,
        )
    return model


def learned(num_ways, training):
    """The encoder at an initialisation that Koi has learned, written and read again by PEFT."""
    koi = Koi(
        adapted(num_ways, training, True), 0.5, 4, ITERATIONS, meta_batch_size=2, seed=0, **ADAM
    )
    koi.train(Episodes(training, num_ways, 80 // num_ways, batch_size=20))
    folder = f"adapter-{num_ways}way"
    koi.model.save_pretrained(folder)  # adapter_config.json and adapter_model.safetensors
    base = Intents(num_ways, training, adapters=False)
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def percent(values):
    """A mean over episodes and its 95 % interval."""
    return f"{100 * values.mean():.1f} ± {196 * values.std() / len(values) ** 0.5:.1f}"


if __name__ == "__main__":
    training, *new = read_intents(sys.argv[1]).split(90, 30, 30)
    num_ways = WAYS[-1]
    starts = {
        "usual": adapted(num_ways, training, True),
        "PiSSA": adapted(num_ways, training, "pissa"),
        "EVA": adapted(num_ways, training, "eva"),
        "Koi's": learned(num_ways, training),
    }
    for num_shots in SHOTS:
        validation, test = (
            Episodes(part, num_ways, num_shots, 40 // num_ways, batch_size=20) for part in new
        )
        usual = None
        for name, model in starts.items():
            what = model, Intents.accuracy
            trials = [measure(*what, validation, NUM_TRIALS, *how).mean() for how in SETTINGS]
            right = measure(*what, test, NUM_TASKS, *SETTINGS[trials.index(max(trials))])
            usual = right if usual is None else usual
            row = f"{num_ways}-way {num_shots}-shot, {name} start: {percent(right)} %"
            print(f"{row}, more than the usual: {percent(right - usual)}", flush=True)
