"""What surrounds a training loop: processes, data, run directory, online kNN, export, evaluation.

A session makes no model, computes no loss, steps no optimizer and calls nothing back: `train.py` does all that in one
flat function, and pasting these methods into it would give the same program.

    session = ImageSession(cfg, METHOD, preset, PRESETS, two_views(cfg), published=PUBLISHED)  # processes, data, views
    model = SimCLR(...)
    session.init_from(model.backbone)                                       # the weights of --init-from, if given
    model = session.place(model, sync_bn=cfg.sync_bn)                       # channels_last, BatchNorm over processes
    model, unwrapped, optimizer = session.prepare(model, optimizer)         # DistributedDataParallel
    session.start(plan={...}, checks=[...], model=unwrapped, optimizer=optimizer)
    for step in session.steps():
        views = session.views(step)
        ...                                                                 # the update
        session.log(loss=loss, lr=lr)
        session.online_knn(step, unwrapped.backbone, spec)
    session.export(unwrapped.backbone, spec)
    session.evaluate(signals=SIGNALS)
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common import checkpoint
from common.backbones import BackboneSpec, export_backbone, multiply_adds
from common.config import RESUMABLE_FIELDS, ImageConfig, TrainingConfig
from common.data import ImageStore, ImageStream, ViewLoader, known_data, open_data
from common.distributed import per_rank, sync_batchnorm
from common.errors import UserError
from common.html import duration
from common.memory import checkpoint_blocks
from common.plan import estimate
from common.run import CHECKPOINTS, Data, HealthCheck, Run, Stateful, directory_of, make_accelerator, read_config
from common.sources import HoldOut, once
from common.views.recipe import ViewRecipe
from common.weights import fill, read_weights
from eval.features import seconds_per_image
from eval.finetune.recipe import DEFAULTS, Recipe
from eval.finish import finish, online_knn, shared_features
from eval.protocols import DEFAULT, Features, cannot_run, protocols_of

Presets = Mapping[str, tuple[str, Any]]
Published = Mapping[str, Sequence[Mapping[str, Any]]]
"""The numbers that papers report, by preset."""
TRAIN, PROBED, TEST = "training images", "probed images", "test images"
"""What a run uses images for, as config.json records them."""
SAME_NUMBERS = frozenset(
    ("seed", "precision", "compile", "deterministic", "knn_every", "activation_checkpointing", "image_column")
    + ("label_column", "eval_image_column", "eval_label_column", "micro_batch")
)
"""Settings besides `RESUMABLE_FIELDS` with which a run is still its preset's."""


TOTALS = ("training images", "judged on", "steps", "parameters", "estimate", "evaluated by", "published")
"""What a plan begins with."""
OTHER_DATA = {"data": "other data", "eval_data": "judged on other data"}  # a path says nothing elsewhere


class Session:
    """Processes and the run directory, for any data.

    `local_batch` rows of each batch belong to this process; `local_slice` selects them from what is sampled for the
    global batch. `total_steps` and `steps_per_epoch` are known once `set_length` was called.
    """

    def __init__(
        self,
        cfg: TrainingConfig,
        method: str,
        preset: str,
        presets: Presets,
        *,
        published: Published = MappingProxyType({}),
        batch_size: int = 0,
    ):
        """`batch_size`: rows that are shared among the processes, `cfg.batch_size` unless given.

        Seeds torch's global generator, from which the networks' initial weights are sampled next. Raises UserError if
        the batch does not divide among the processes, or the launch is not what it seems (`make_accelerator`).
        """
        self.cfg, self.method, self.preset, self.presets = cfg, method, preset, presets
        self.reported = published.get(preset, ())
        if cfg.deterministic:  # cuBLAS reads it when CUDA starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.accelerator = make_accelerator(cfg.precision)
        self.device, self.num_processes = self.accelerator.device, self.accelerator.num_processes
        self.process_index, self.is_main = self.accelerator.process_index, self.accelerator.is_main_process
        self.local_batch = per_rank(batch_size or cfg.batch_size, self.num_processes)
        self.local_slice = slice(self.process_index * self.local_batch, (self.process_index + 1) * self.local_batch)
        self.autocast, self.backward = self.accelerator.autocast, self.accelerator.backward
        self.no_sync, self.print = self.accelerator.no_sync, self.accelerator.print
        self.initial_weights: dict[str, Any] | None = None
        self.print(f"{method} {preset}: {self.num_processes} x {self.device.type}")
        self._trained: list[tuple[nn.Module, torch.optim.Optimizer]] = []
        torch.use_deterministic_algorithms(cfg.deterministic)
        torch.manual_seed(cfg.seed)

    def set_length(self, total_steps: int, steps_per_epoch: float) -> None:
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch

    def init_from(self, backbone: nn.Module, others: Mapping[str, Tensor] | None = None) -> None:
        """Under --init-from: copy its weights into `backbone`, in place, before a teacher is made of it.

        others: as of `common.weights.fill`. A run that has a checkpoint starts from that instead and reads no weights.
        Raises UserError where the weights cannot be had or nothing in them fits.
        """
        self.initial_weights = {}
        if not self.cfg.init_from:
            return
        directory = directory_of(self.cfg, self.method, self.preset, self.cfg.seed)
        if checkpoint.steps(directory / CHECKPOINTS) and not self.cfg.plan:
            self.initial_weights = read_config(directory).get("initial_weights", {})
            return
        filled = fill(backbone, read_weights(self.cfg.init_from), others, "--init-from")
        self.initial_weights = filled.record()
        self.print(filled.notice())

    def place(self, model: nn.Module, *, sync_bn: bool) -> nn.Module:
        """`model` in channels_last, with BatchNorm statistics over all processes if `sync_bn`."""
        model = model.to(memory_format=torch.channels_last)
        return sync_batchnorm(model) if sync_bn else model

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        """(the model to call, the same without DistributedDataParallel, the optimizer), on the device.

        `export` takes the optimizer's state, the gradients and their buckets away: evaluation needs the memory.
        """
        with warnings.catch_warnings():  # of torch 2.14 and newer, about the way Accelerate passes an option on
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            model, optimizer = self.accelerator.prepare(model, optimizer)
        self._trained.append((model, optimizer))
        return model, self.accelerator.unwrap_model(model), optimizer

    def start(
        self,
        *,
        plan: Mapping[str, str],
        data: Mapping[str, Data],
        checks: Sequence[HealthCheck] = (),
        **stateful: Stateful | None,
    ) -> None:
        """Open the run directory, print `plan` and what papers report under --plan, and load what `stateful` names from
        the last checkpoint.

        data: by the name of their use, e.g. {"train": store}. Raises UserError where the directory holds a run with
        another config or other data.
        """
        if self.cfg.init_from and self.initial_weights is None:
            raise UserError("--init-from: this train.py does not call session.init_from, so nothing would be loaded")
        self.run = Run(
            self.cfg,
            method=self.method,
            preset=self.preset,
            seed=self.cfg.seed,
            config=self.cfg.record(),
            accelerator=self.accelerator,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=self.cfg.batch_size,
            data=data,
            initial_weights=self.initial_weights,
        )
        self.run.afterwards = ", then the evaluation" if self.cfg.eval else ""
        trained = sum(p.numel() for model, _ in self._trained for p in model.parameters() if p.requires_grad)
        facts = {"parameters": f"{trained / 1e6:,.4g} M trained", **plan}
        if published := self.published:
            told = (
                f"{p['value']} {p['protocol']} ({p['source']}{p.get('note') and '; ' + p['note']})" for p in published
            )
            facts["published"] = ", ".join(told)
            if reason := published[0].get("not_compared"):
                facts["published"] += f"; not compared: {reason}"
        totals = {name: facts[name] for name in TOTALS if name in facts}
        self.run.show_plan(self.cfg, self.presets[self.preset][1], {**totals, **facts})
        self.run.watch(*checks)
        self.run.resume(**stateful, scaler=self.accelerator.scaler)
        self.print = self.run.print

    def steps(self) -> Iterator[int]:
        """The steps that remain; checkpoints, health checks and signals are handled between two of them."""
        return self.run.steps()

    def log(self, **values: Tensor | float) -> None:
        """The step's metrics, 0-d tensors or numbers: the same names every step, `loss` among them."""
        self.run.log(**values)

    @property
    def published(self) -> list[Mapping[str, Any]]:
        """Published numbers of the preset, for the card: where the run is not the preset's, each says why it is not
        compared ("not_compared")."""
        reason = "; ".join(filter(None, (self._not_the_preset(), *(f"extended, {text}" for text in self.run.extended))))
        return [{**entry, "not_compared": reason} for entry in self.reported] if reason else list(self.reported)

    def _not_the_preset(self) -> str:
        """Data, budget and settings that differ from the preset's, in a phrase; empty if none does."""
        before, now = self.presets[self.preset][1].record(), self.cfg.record()
        changed = [
            OTHER_DATA[name] if name in OTHER_DATA else f"{name} {now[name]}, not {value}"
            for name, value in before.items()
            if name not in RESUMABLE_FIELDS | SAME_NUMBERS | {"init_from"} and now[name] != value
        ]
        if before.get("init_from") != now.get("init_from"):
            changed.insert(0, f"started from {now.get('init_from', 'random weights')}")
        if 0 < self.cfg.max_steps < self.total_steps:
            changed.insert(0, f"{self.cfg.max_steps} of {self.total_steps} steps")
        return "; ".join(changed)

    @property
    def evaluates(self) -> bool:
        """Whether this process will evaluate: the first one, unless --no-eval."""
        return self.is_main and self.cfg.eval

    def export(self, backbone: nn.Module, spec: BackboneSpec) -> None:
        """Write the backbone's weights and description and end the process group: the first process evaluates alone.

        Of what training held, only the weights stay.
        """
        self._write(backbone, spec)
        self.accelerator.end_training()

    def _write(self, backbone: nn.Module, spec: BackboneSpec) -> None:
        if self.is_main:
            export_backbone(self.run.directory, backbone, spec)
        self.accelerator.wait_for_everyone()
        for model, optimizer in self._trained:
            optimizer.state.clear()
            model.zero_grad(set_to_none=True)
            if isinstance(model, DistributedDataParallel):
                del model.reducer, model.logger  # which hold the buckets, as large as the gradients
        self._trained.clear()


class ImageSession(Session):
    """A session on images: `train` and `test` are stores, `test` None where nothing is evaluated.

    `probed` is what kNN and probes are fitted on: the training images, or the labeled ones where `split` is another,
    or those of --eval-data. Of data that have neither labels nor a test split, all images are trained on, and a tenth
    of them serves as `test`, the others as `probed`.
    """

    cfg: ImageConfig
    steps_per_epoch: int

    def __init__(
        self,
        cfg: ImageConfig,
        method: str,
        preset: str,
        presets: Presets,
        views: ViewRecipe,
        *,
        published: Published = MappingProxyType({}),
        split: str = "train",
        protocols: Sequence[str] = DEFAULT,
        finetuning: Recipe = DEFAULTS,
    ):
        """protocols: of the evaluation, for which --eval-protocols may name others; a run that is its preset's adds
        those of the `published` numbers. finetuning: of finetune, lowshot.

        Raises UserError as `Session` does, and where the data cannot be had or is too small for the batch.
        """
        super().__init__(cfg, method, preset, presets, published=published)
        self.recipe = views
        self._features: Features | None = None
        self._multiply_adds = 0  # of the backbone on all views of an image, for a plan
        self.finetuning = finetuning
        self._notice = once(self.print)
        self.train = self._open(split, limit=cfg.limit, hold_out="never" if cfg.eval_data else "labeled")
        scored = bool(cfg.eval or cfg.knn_every)
        self.test = self._open_judged("test") if scored else None
        self.probed = self._open_probed(split) if scored else self.train
        own = split == "train" and not cfg.eval_data and self.train.labels is not None  # what an evaluation would open
        self._probed_known = scored or own
        self.loader = ViewLoader(
            self.train,
            views,
            batch_size=cfg.batch_size,
            seed=cfg.seed,
            rank=self.process_index,
            world_size=self.num_processes,
            device=self.device,
            workers=cfg.workers,
        )
        self.set_length(cfg.epochs * self.loader.steps_per_epoch, self.loader.steps_per_epoch)
        papers = [] if self._not_the_preset() else protocols_of(self.reported)
        self.protocols = tuple(cfg.eval_protocols or dict.fromkeys((*protocols, *papers)))
        self._views: list[Tensor] = []
        torch.manual_seed(cfg.seed)

    def init_from(self, backbone: nn.Module, others: Mapping[str, Tensor] | None = None) -> None:
        super().init_from(backbone, others)
        if self.cfg.plan:  # before anything is compiled
            self._multiply_adds = sum(multiply_adds(backbone, view.size) for view in self.recipe.views)
        view, weights = self.recipe.views[0], self.initial_weights or {}
        own = {"mean": list(view.mean), "std": list(view.std)}
        if weights.get("inputs", own) != own:
            before, now = (f"mean {i['mean']} and std {i['std']}" for i in (weights["inputs"], own))
            self.print(f"NOTE {weights['name']} was trained on inputs of {before}, this run has {now}: see --normalize")

    def _open(
        self, split: str, *, limit: int = 0, hold_out: HoldOut = "always", judged: bool = False
    ) -> ImageStore | ImageStream:
        cfg = self.cfg
        spec = cfg.eval_data if judged else cfg.data
        if cfg.plan == "short" and (known := known_data(spec, split, limit or None)):
            return known
        return open_data(
            spec,
            split,
            limit=limit or None,
            image_size=cfg.image_size,
            image_column=(cfg.eval_image_column if judged else cfg.image_column) or None,
            label_column=(cfg.eval_label_column if judged else cfg.label_column) or None,
            hold_out=hold_out,
            device=self.device,
            workers=cfg.workers,
            log=self._notice,
        )

    def _open_judged(self, split: str, limit: int = 0) -> ImageStore | ImageStream:
        return self._open(split, limit=limit, judged=bool(self.cfg.eval_data))

    def _open_probed(self, split: str) -> ImageStore | ImageStream:
        if split != "train" or self.cfg.eval_data:
            return self._open_judged("train")
        if self.train.labels is not None:
            return self.train
        probed = self._open("train", limit=self.cfg.limit)
        if probed.fingerprint == self.train.fingerprint:
            return self.train
        self._notice(
            f"{self.cfg.data}: no labels and no test split, so nothing is held out of the training: what needs no "
            "labels is measured on images that were trained on. Labeled images elsewhere: --eval-data"
        )
        return probed

    def speed_up(self, *networks: nn.Module, checkpointed: nn.Module | None = None) -> None:
        """torch.compile for `networks` under --compile; recompute the blocks of the backbone `checkpointed`."""
        if checkpointed is not None:
            checkpoint_blocks(checkpointed)
        if self.cfg.compile:
            for network in networks:
                network.compile()

    def start(
        self,
        *,
        plan: Mapping[str, str],
        data: Mapping[str, Data] | None = None,
        checks: Sequence[HealthCheck] = (),
        **stateful: Stateful | None,
    ) -> None:
        """As of a `Session`, and say which protocols the data cannot serve; data: the images that the session has
        opened, unless given."""
        impossible: Mapping[str, str] = {}
        if self.cfg.eval and self.test is not None:
            impossible = cannot_run(self.protocols, self.probed, self.test, self.finetuning)
        common = {
            "training images": f"{len(self.train):,} of {self.train.name}",
            **({"judged on": self.probed.name} if self.cfg.eval_data else {}),
            **({"evaluated by": ", ".join(p for p in self.protocols if p not in impossible)} if self.cfg.eval else {}),
            "steps": f"{self.total_steps:,} = {self.cfg.epochs} epochs x {self.steps_per_epoch}; "
            f"batch {self.cfg.batch_size} = {self.num_processes} processes x {self.local_batch}",
        }
        if data is None:
            opened = {TRAIN: self.train, PROBED: self.probed if self._probed_known else None, TEST: self.test}
            data = {use: store for use, store in opened.items() if store is not None}
        if self._multiply_adds:
            costs = {"batch_size": self.cfg.batch_size, "steps_per_epoch": self.steps_per_epoch}
            common["estimate"] = estimate(self._multiply_adds, steps=self.total_steps, **costs)
        super().start(plan={**common, **plan, "views": self.recipe.describe()}, data=data, checks=checks, **stateful)
        if self.evaluates:
            for name, reason in impossible.items():
                if name != "factors" or self.cfg.eval_protocols:
                    self.print(f"NOTE {name} will not be run: {reason}.")
        warmup = getattr(self.cfg, "warmup_epochs", 0)
        if warmup >= self.cfg.epochs and self.run.start_step == 0:
            self.print(
                f"NOTE the warm-up of {warmup:g} epochs is as long as the run of {self.cfg.epochs}: the learning rate "
                "never falls, or never reaches its peak. Set --warmup-epochs."
            )

    def views(self, step: int) -> list[Tensor]:
        """This process's views of a step, [n, 3, S, S] each, in channels_last. `export` empties the last list."""
        self._views = [view.contiguous(memory_format=torch.channels_last) for view in self.loader(step).views]
        return self._views

    def online_knn(self, step: int, backbone: nn.Module, spec: BackboneSpec) -> None:
        """At the end of every `knn_every`th epoch: log the kNN accuracy of the backbone after `step`.

        After the first step of all, time a forward pass for the estimate of what the evaluation will take.
        """
        if step == self.run.start_step:
            self._estimate_evaluation(backbone, spec)
        if self.run.epoch_ends(step, self.cfg.knn_every):
            assert self.test is not None  # opened, as knn_every is set
            with self.run.untimed():
                online_knn(self.run, step, backbone, spec, self.probed, self.test)

    def _estimate_evaluation(self, backbone: nn.Module, spec: BackboneSpec) -> None:
        if not self.evaluates or self.cfg.compile:  # in eval mode, a compiled network would be compiled again
            return
        assert self.test is not None
        images = len(self.probed) + len(self.test)
        with self.run.untimed():
            seconds = images * seconds_per_image(backbone, self.test, spec, self.device)
        networks = (2 if self.cfg.eval_baselines else 1) / self.num_processes
        self.run.afterwards = f", then at least {duration(networks * seconds)} of evaluation"

    def export(self, backbone: nn.Module, spec: BackboneSpec) -> None:
        """As of a `Session`; before they leave, the other processes take their share of the features to evaluate."""
        self.loader.close()
        self._views.clear()
        self._write(backbone, spec)
        if self.cfg.eval and self.num_processes > 1:
            assert self.test is not None  # opened, as cfg.eval is set
            self._features = shared_features(self.run, self.probed, self.test)
        self.accelerator.end_training()

    def evaluate(
        self,
        *,
        signals: Mapping[str, str],
        references: Mapping[str, tuple[float, str]] | None = None,
        extra_sections: Sequence[tuple[str, str]] = (),
        extra_rows: Sequence[dict] = (),
    ) -> None:
        """Score the exported backbone, write the result card and the report; arguments as in `eval.finish.finish`.

        Does nothing under --no-eval, and in all processes but the first.
        """
        if not self.evaluates:
            return
        assert self.test is not None  # opened, as cfg.eval is set
        finish(
            self.run,
            train=self.probed,
            test=self.test,
            pretrained_on=self.train if self._judged_elsewhere else None,
            recipe=self.recipe,
            published=self.published,
            signals=signals,
            references=references,
            extra_sections=extra_sections,
            extra_rows=extra_rows,
            protocols=self.protocols,
            finetuning=self.finetuning,
            features=self._features,
        )

    @property
    def _judged_elsewhere(self) -> bool:
        """Whether other images are probed than those of the data's training split that were trained on."""
        return bool(self.cfg.eval_data) or (self.probed is not self.train and self.train.labels is None)
