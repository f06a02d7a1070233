"""Preference models at work: what K of them say of responses. reward.py trains them; ppo.py and eval.py ask them.

A preference model is a Llama with a scalar head, whole or an adapter, in a folder with principle.json beside it: the
principle's name, and the mean and standard deviation of the scores on the responses trained on.
"""
from pathlib import Path

from common import UserError

import torch

import chat
import checkpoint
import data
import files
from model import computes_bf16, device_named, document_scores


class Scorers:
    """K preference models in folders. Adapters of one base, asked by one template, run side by side on it, each row of
    the batch with its own; others run one after another. names [K]; mean, std (K,): of the scores on the responses
    trained on."""

    def __init__(self, folders, device=None):
        self.device, about = device_named(device), [read_principle(folder) for folder in folders]
        self.folders = folders
        self.names = [principle["name"] for principle in about]
        self.mean, self.std = (torch.tensor([float(principle[key]) for principle in about]) for key in ("mean", "std"))
        by_base = {}
        for number, folder in enumerate(folders):
            base = str(checkpoint.base_of(folder).resolve()) if checkpoint.is_adapter(folder) else f"{number}"
            by_base.setdefault((base, chat.fingerprint(folder)), []).append(number)
        self.parts = [(numbers, *self.load([folders[number] for number in numbers])) for numbers in by_base.values()]

    @property
    def fingerprint(self):
        """{name: a checksum of the model}: others for models that score otherwise."""
        return {name: checkpoint.fingerprint(folder) + (chat.fingerprint(folder) or "")
                for name, folder in zip(self.names, self.folders)}

    def load(self, folders):
        """The adapters of one base, or the one whole model, and its tokenizer."""
        adapters = checkpoint.is_adapter(folders[0])
        base = checkpoint.base_of(folders[0]) if adapters else folders[0]
        dtype = torch.bfloat16 if self.device.type == "cuda" and computes_bf16(self.device) else torch.float32
        llama = checkpoint.load(base, dtype, self.device, scorer=True)
        if adapters:
            checkpoint.load_adapters(llama, folders)
        for folder in folders:
            if not has_scalar_head(folder):
                raise UserError(f"{folder}: is a language model, which gives no scores; give a preference model")
        if len(llama.score.weight) != len(folders):
            raise UserError(f"{', '.join(map(str, folders))}: {len(llama.score.weight)} scalar heads; give preference "
                            "models with one each")
        tokenizer = chat.with_template(checkpoint.load_tokenizer(folders[0], llama), folders[0], llama.config)
        return llama.eval(), tokenizer

    @torch.inference_mode()
    def score(self, prompts, responses, micro_tokens=8192):
        """Raw scores (K, N) in fp32 of N responses to N prompts (texts). Of a text that is longer than the model's
        context, the end is read."""
        scores = torch.zeros(len(self.names), len(prompts))
        rows = [{"prompt": prompt, "completion": response} for prompt, response in zip(prompts, responses)]
        for numbers, llama, tokenizer in self.parts:
            stop = llama.config.stop_ids[0] if llama.config.stop_ids else None
            documents = [document.ids[-llama.config.max_position_embeddings:] for document in
                         data.encode_documents(tokenizer, rows, llama.config.bos_token_id, stop)]
            for chosen in batches_of(documents, micro_tokens // len(numbers)):
                tokens = torch.tensor([token for i in chosen for token in documents[i]], device=self.device)
                found = document_scores(llama, tokens, [len(documents[i]) for i in chosen])
                scores[torch.tensor(numbers)[:, None], torch.tensor(chosen)] = found.cpu()
        return scores


def has_scalar_head(folder):
    if checkpoint.is_adapter(folder):
        return checkpoint.adapter_config(folder)[0].get("task_type") == "SEQ_CLS"
    return checkpoint.read_config(Path(folder) / "config.json").num_labels > 0


def batches_of(documents, most):
    """Lists of indices of documents, those of like length together, at most about `most` tokens at a time."""
    chosen, size = [], 0
    for i in sorted(range(len(documents)), key=lambda i: len(documents[i])):
        if chosen and size + len(documents[i]) > most:
            yield chosen
            chosen, size = [], 0
        chosen.append(i)
        size += len(documents[i])
    if chosen:
        yield chosen


def read_principle(folder):
    """What principle.json says; a model from elsewhere goes by its folder's name, its scores as they are."""
    path = Path(folder) / "principle.json"
    if not path.exists():
        return {"name": Path(folder).name, "mean": 0.0, "std": 1.0}
    content = files.read_json(path)
    wanted = {"name": str, "mean": (int, float), "std": (int, float)}
    if not isinstance(content, dict) or not all(isinstance(content.get(key), kind) for key, kind in wanted.items()):
        raise UserError(f"{path}: holds no name, mean and std; train the preference model again")
    return content


def score_once(scorers, texts):
    """Raw scores (K, N) of N texts (prompt, response); one that stands there several times is scored once."""
    place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    scores = scorers.score([prompt for prompt, _ in place], [response for _, response in place])
    return scores[:, [place[text] for text in texts]]
