"""Tasks of lm_eval, decoded by one rule of a protocol; lm_eval asks and grades. The same command continues.
    python tools/harness.py --model dream --tasks gsm8k_cot_zeroshot --protocol tad --apply_chat_template"""
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import compare  # noqa: F401, first: it puts the folder above on the path
import cli
import data
import eval as nt_eval
from cli import UserError, option, package, run_cli, write_whole
from sample import Decoding, check_used

UNSAFE = "would run code here: `eval.py curve --task humaneval` contains it, --allow_code_execution insists"


def lm_eval_package():
    return package("lm_eval.evaluator", "this needs lm_eval: pip install 'lm_eval[math,ifeval]'").lm_eval


def bridge(model, tok, settings, batch_size=32, kept=None):
    """The model as an LM of lm_eval: `settings` decide; each rank sees all requests and decodes its share."""
    class MaskedDiffusion(lm_eval_package().api.model.LM):
        tokenizer_name = f"nanotraj-{model.cfg.family}"
        chats = {}  # a rendered text -> its ids: not every special token in it is one
        decoded = {}  # digest of the prompt, repeat -> row, see eval.decode_rows
        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            if not isinstance(tok.chat, data.OwnChat):
                raise UserError("the tiny model has no chat template: leave --apply_chat_template out")
            turns = [(said["role"], said["content"]) for said in chat_history]
            answer = "" if add_generation_prompt else turns.pop()[1]  # how the reply begins
            text = tok.chat.render(turns, add_generation_prompt=True) + answer
            self.chats[text] = tok.chat.prompt_ids(turns) + tok.encode(answer)
            return text
        def prompt_ids(self, context):
            if self.chats and context not in self.chats:
                raise UserError(f"a task changed its rendered chat, so that its special tokens are lost: "
                                f"{context[-60:]!r}; run it without --apply_chat_template")
            plain = tok.encode if isinstance(tok.chat, data.OwnChat) else tok.prompt_ids  # with its ends
            return torch.as_tensor(self.chats.get(context) or plain(context)).long()
        def generate_until(self, requests):
            from lm_eval.models.utils import postprocess_generated_text as before_stop
            names, prompts, seen = [], {}, Counter()
            for request in requests:
                context = request.args[0]
                name = nt_eval.digest(context)  # one that comes again is decoded again only if it is sampled
                names.append(f"{name}-{seen[name] if settings.get('temperature') else 0}")
                prompts[names[-1]] = self.prompt_ids(context)
                seen[name] += 1
            self.decoded |= nt_eval.decode_by_id(model, tok, prompts, settings, batch_size, kept, "responses")
            return [before_stop(self.decoded[name]["response"], request.args[1].get("until"), None)
                    for name, request in zip(names, requests)]
        def loglikelihood(self, requests):
            raise UserError("a task asks for log-likelihoods: choose those that ask for generate_until alone")
        loglikelihood_rolling = loglikelihood
    model.eval()
    return MaskedDiffusion()


def load_tasks(names, include_path, allow_code):
    """Names of lm_eval's tasks, groups or tags, of ours in assets/, or YAML files -> a manager with them."""
    if allow_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # its tasks of code want it when they are imported
    own = all(map(os.path.isfile, names))  # then lm_eval's thousands need not be read
    places = [nt_eval.nt_model.HERE / "assets", *data.listed(include_path)]
    manager = lm_eval_package().tasks.TaskManager(include_path=places, include_defaults=not own)
    try:
        loaded = manager.load(names)
    except Exception as e:  # no such task, no hub, a package the task needs, a broken YAML
        if "HF_ALLOW_CODE_EVAL" in str(e):
            raise UserError(f"{', '.join(names)} {UNSAFE}") from None
        raise UserError(f"lm_eval cannot load {', '.join(names)} ({cli.reason(e)}): `lm_eval ls tasks` lists "
                        f"what it has, --include_path adds a directory of your own") from None
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE != "generate_until":
            raise UserError(f"task {name} asks for {task.OUTPUT_TYPE}: choose one of generate_until")
        if getattr(task, "UNSAFE_CODE", False) and not allow_code:
            raise UserError(f"task {name} {UNSAFE}")
    manager.load = lambda names: loaded  # simple_evaluate asks for the same ones again
    return manager


@dataclass
class Options(nt_eval.AdaptedModel, nt_eval.ProtocolOptions):
    tasks: str = option()  # lm_eval's names or YAML files, with commas
    include_path: str | None = None  # directory with task YAMLs of your own
    num_fewshot: int | None = None  # instead of the task's
    limit: int | None = None  # only the first problems of each task
    apply_chat_template: bool = False  # one chat per problem, not plain text
    fewshot_as_multiturn: bool = True  # with a chat template: few-shots are turns of their own
    system_instruction: str | None = None  # system text
    metric: str = ""  # NAME,FILTER of lm_eval: which answers are right for compare.py [a task's first]
    batch_size: int = 64  # problems decoded at once, per rank
    allow_code_execution: bool = False  # run the programs that the model writes, in this process


def main():
    args, given = cli.parse(__doc__, Options, Decoding)
    names = args.tasks.split(",")
    protocol = nt_eval.settle(args, names, given)
    if len(args.points or args.thresholds or [0]) > 1:
        raise UserError("lm_eval takes one point at a time: a single --points or --thresholds")
    settings = protocol | protocol["rules"][0]
    decoding = nt_eval.decoding_of(settings)
    check_used(decoding)
    manager = load_tasks(names, args.include_path, args.allow_code_execution)  # before 8B parameters
    model, tok = nt_eval.load_both(args)
    config = nt_eval.made_of(args, model, chat=args.apply_chat_template, decoding=vars(decoding))
    out = args.out or f"out/lm_eval-{args.label}-{'-'.join(Path(name).stem for name in names)[:60]}"
    kept = nt_eval.Kept(out, config)
    asking = bridge(model, tok, settings, args.batch_size, kept)
    same = "num_fewshot limit apply_chat_template system_instruction fewshot_as_multiturn".split()
    results = lm_eval_package().simple_evaluate(
        model=asking, tasks=names, task_manager=manager, confirm_run_unsafe_code=args.allow_code_execution,
        **{name: getattr(args, name) for name in same})
    if kept.rank:
        return
    groups, pooled = manager.load(names)["groups"], {}
    wholes = {task.task_name: of.name for of in [*groups.values()][::-1] for task in of.get_all_tasks()}
    for name, rows in results.pop("samples").items():
        rows.sort(key=lambda row: (row["doc_id"], row["filter"]))
        lines = [json.dumps(row, default=str) + "\n" for row in rows]
        write_whole(kept.out / f"samples-{name}.jsonl", "".join(lines))
        metrics = [key for key in results["results"][name] if "," in key and args.metric in key]
        if not metrics:
            raise UserError(f"--metric {args.metric}: {name} has {', '.join(results['results'][name])}")
        metric, kind = metrics[0].split(",")
        graded = [dict(asking.decoded[nt_eval.digest(row["arguments"][0][0]) + "-0"], metric=metrics[0],
                       id=f"{name}-{row['doc_id']}", correct=int(row[metric]))
                  for row in rows if row["filter"] == kind]
        pooled.setdefault(wholes.get(name, name), []).extend(graded)  # a group is one task, weighed by size
    points = [{key: [row[key] for row in rows] for key in nt_eval.COUNTS} | dict(
        key=task, label=args.label, rule=nt_eval.rule_name(settings), ids=[row["id"] for row in rows],
        seconds=nt_eval.wall_seconds(rows), provenance=dict(config, task=task, metric=rows[0]["metric"]))
        for task, rows in pooled.items()]
    write_whole(kept.results, "".join(map(cli.line_of, points)))
    facts = dict(results, provenance=nt_eval.provenance(**config), pretty_env_info=None)
    write_whole(kept.out / "lm_eval.json", json.dumps(facts, indent=1, default=str) + "\n")
    print(lm_eval_package().utils.make_table(results))
    for point in points:
        print(f"{point['key']}: {point['rule']}, TPF {nt_eval.tpf(point):.2f}; batch {args.batch_size}")
    print(f"written: {kept.results}, {kept.out / 'lm_eval.json'}, {kept.out / 'samples-*.jsonl'}")


if __name__ == "__main__":
    run_cli(main)
