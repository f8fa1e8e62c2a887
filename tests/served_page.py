"""Serves the page alone, in a process of its own: `python served_page.py PORT STORE MODEL... [--keys FILE]`."""

import argparse
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from flawmap.service.keys import Keys
from flawmap.service.page import mount_page
from flawmap.service.service import Options, open_service

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("store", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--keys", type=Path)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    keys = None if given.keys is None else Keys.read(given.keys)
    service = open_service(
        given.models, Options(given.store, keep="all", keys=keys, data=given.data, engine="onnxruntime", threads=1)
    )
    app = FastAPI()
    mount_page(app, service)
    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning")
