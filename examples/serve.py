"""A small HTTP server: adapters of many customers on one backbone, made and used over the wire.

    pip install "mcdi_hf[serve]"
    python examples/serve.py --pipeline model_cards/mcdi-minilm-text --adapters adapters --port 8000

    curl localhost:8000/adapters
    curl localhost:8000/predict -H 'content-type: application/json' \\
        -d '{"adapter": "shop", "texts": ["where is my parcel"]}'
    curl -X PUT localhost:8000/adapters/shop -H 'content-type: application/json' \\
        -d '{"refund": ["where is my money"], "delivery": ["has it shipped yet"]}'

Every folder in `--adapters` is one adapter, by the name of the folder, such as `mcdi-hf generate --task_column` makes them.
Requests are answered one after the other. There is no login: put it behind a proxy that has one.
"""

import argparse
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, StringConstraints
from pydantic import Field as Bounded

from mcdi_hf import MCDiPipeline, MixedAdapters


MAX_BYTES = 8_000_000  # of a request's body, which is read before anything in it is counted
Text = Annotated[str, StringConstraints(min_length=1, max_length=10_000)]
Texts = Annotated[list[Text], Bounded(min_length=1, max_length=256)]
Support = Annotated[dict[Text, Texts], Bounded(min_length=2, max_length=100)]


class Question(BaseModel):
    """Texts to classify, and by which adapter."""

    adapter: str
    texts: Texts


def make_app(pipe: MCDiPipeline, folder: Path | None = None) -> FastAPI:
    """The server's application, with the adapters that are saved in a folder."""
    turns = threading.Lock()
    mixed = MixedAdapters(pipe.backbone, pipe.codec.layout)
    for place in sorted(folder.iterdir() if folder else []):
        if (place / "adapter_config.json").is_file():
            mixed.add(place.name, place)
    app = FastAPI(title="mcdi_hf")

    @app.middleware("http")
    async def bounded(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        length = request.headers.get("content-length", "0")
        if "transfer-encoding" in request.headers or not length.isdigit() or int(length) > MAX_BYTES:
            return JSONResponse({"detail": f"Expected a body whose length is told, {MAX_BYTES} bytes at most."}, 413)
        return await answer(request)

    @app.get("/adapters")
    def names() -> list[str]:
        return mixed.names

    @app.post("/predict")
    def predict(question: Question) -> list[dict[str, str | float]]:
        try:
            output = mixed(question.texts, [question.adapter] * len(question.texts))
        except ValueError as error:
            raise HTTPException(404, str(error)) from error
        scores = output.logits.softmax(dim=-1).amax(dim=-1).tolist()
        return [{"label": label, "score": score} for label, score in zip(output.labels, scores)]

    @app.put("/adapters/{name}")
    def put(name: str, support: Support) -> list[str]:
        with turns:  # a pipeline serves one call at a time
            try:
                (adapter,) = pipe(support, generator=torch.Generator().manual_seed(0)).adapters
            except ValueError as error:
                raise HTTPException(422, str(error)) from error
            (mixed.replace if name in mixed else mixed.add)(name, adapter)
        return adapter.labels

    @app.delete("/adapters/{name}")
    def delete(name: str) -> None:
        with turns:  # not between a look at the names and what is done with them
            try:
                mixed.drop(name)
            except ValueError as error:
                raise HTTPException(404, str(error)) from error

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="model_cards/mcdi-minilm-text", help="a folder or a Hub id")
    parser.add_argument("--base_model_name_or_path", help="a local copy of its backbone")
    parser.add_argument("--adapters", type=Path, help="a folder of saved adapters")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="where to listen (default: %(default)s)")
    args = parser.parse_args()
    pipe = MCDiPipeline.from_pretrained(args.pipeline)
    if args.base_model_name_or_path:
        pipe.register_to_config(base_model_name_or_path=args.base_model_name_or_path)
    pipe.set_progress_bar_config(disable=True)
    uvicorn.run(make_app(pipe, args.adapters), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
