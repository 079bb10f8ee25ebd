"""How an online trainer gets completions: from the sampler here or from a server, under one stop rule."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import EvalLoopOutput

from hydratune.algos.online_evaluation import EvaluatingTrainer
from hydratune.episodes import Episodes
from hydratune.errors import UserError
from hydratune.rollout import Completions, Sampling, context_of, generate
from hydratune.samples import stop_tokens
from hydratune.vllm_server import VLLMServer, require_plain_lora


class SamplingTrainer(EvaluatingTrainer):
    """The part of `OnlineTrainer` that samples."""

    _server: VLLMServer | None = None

    @property
    def temperature(self) -> float:  # type: ignore[override]
        return self.args.temperature

    @classmethod
    def server_of(cls, args: Any, *, adapter: bool, run: str = "") -> VLLMServer | None:
        """The server that completions come from, if they do."""
        if args.vllm_server_base_url is None:
            return None
        folder = Path(args.vllm_server_folder or args.output_dir)
        return VLLMServer(
            args.vllm_server_base_url,
            timeout=args.vllm_server_timeout,
            folder=folder,
            adapter=adapter,
            run=run,
        )

    @classmethod
    def check_services(cls, args: Any, config: Any, adapter: Any) -> None:
        server = cls.server_of(args, adapter=adapter is not None)
        if server is None:
            return
        require_plain_lora(adapter)
        if found := server.check(getattr(config, "_name_or_path", "") or ""):
            raise UserError(found)

    def _set_server(self) -> None:
        adapters = getattr(self.model, "peft_config", None) or {}
        # two runs may have the same weights, e.g. at their start, on one server
        run = [uuid.uuid4().hex]
        broadcast_object_list(run)
        self._server = self.server_of(self.args, adapter=bool(adapters), run=run[0])
        adapter = adapters.get(getattr(self.model, "active_adapter", None))
        self.check_services(self.args, self.model.config, adapter)

    @property
    def sampling(self) -> Sampling:
        args, tokenizer = self.args, self.processing_class
        vocabulary = self.model.config.get_text_config().vocab_size
        return Sampling(
            max_new_tokens=args.new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            stop_token_ids=self.stop_tokens,
            pad_token_id=tokenizer.pad_token_id or 0,
            vocab_size=min(len(tokenizer), vocabulary),
        )

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The one stop rule, of generation, masks, scores and penalties: EOS, and what ends a turn of the chat template."""
        conversation = isinstance(self.train_dataset[0].get("prompt"), list)
        return stop_tokens(self.model, self.processing_class, conversation=conversation)

    def send_weights(self) -> None:
        """Have the server, if there is one, use the policy as it is; on every process, also on one that samples nothing."""
        if self._server is not None:
            policy = self.accelerator.unwrap_model(self.model)
            self._server.follow(policy, sends=self.is_world_process_zero())
            self.accelerator.wait_for_everyone()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._server is not None:
                self._server.tidy()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if self._server is not None and not self.is_in_train:
                self._server.tidy()

    def _generate(self, prompts: list[Any], copies: int, generator: torch.Generator) -> Completions:
        policy, most = self.accelerator.unwrap_model(self.model), self.args.local_rollout_forward_batch_size
        if self._server is None:
            with self.accelerator.autocast():
                return generate(
                    policy, prompts, self.sampling, copies=copies, batch_size=most, generator=generator
                )
        return self._server.generate(
            prompts,
            self.sampling,
            context=context_of(policy),
            copies=copies,
            at_once=most,
            generator=generator,
        )

    def _old_logps(self, episodes: Episodes, found: Any) -> torch.Tensor:
        """log π of the tokens as training computes it: our sampler's own in fp32, else from another forward pass."""
        exact = (
            self._server is None
            and not (self.args.bf16 or self.args.fp16)
            and next(self.model.parameters()).dtype == torch.float32
        )
        if exact and found is not None:
            return episodes.padded(found)
        return self.scored(episodes, lambda layout: self.judge(self.model, layout).per_token)
