"""Findings about the ports that the settings fix. Tries each on its own, so that all that are taken are named."""

from __future__ import annotations

from collections.abc import Iterator

from tide_pipeline.config import TideConfig
from tide_pipeline.errors import PortInUse
from tide_pipeline.serve.process import choose_ports
from tide_pipeline.stack.doctor.finding import Finding
from tide_pipeline.stack.local import PORTS, LocalStack

OPEN_HOSTS = ("0.0.0.0", "::")     # noqa: S104 compared, not bound


def check_ports(config: TideConfig) -> Iterator[Finding]:
    if LocalStack.running(config.state) is not None:
        yield Finding("ports", "ok", f"the stack in {config.state.root} is up and has its own")
        return
    fixed = {name: getattr(config.stack, name) for name in PORTS if getattr(config.stack, name)}
    twice = {port for port in fixed.values() if list(fixed.values()).count(port) > 1}
    for name, port in fixed.items():
        try:
            choose_ports(config.stack, (name,))
        except PortInUse as error:
            yield Finding(f"ports: {name}", "fail", str(error).partition(": set")[0], f"set stack.{name} to a free port, or to 0 for any")
            continue
        if port in twice:
            yield Finding(f"ports: {name}", "fail", f"port {port} is named twice", f"set stack.{name} to another one, or to 0 for any")
        else:
            yield Finding(f"ports: {name}", "ok", f"{port} is free")
    if not fixed:
        yield Finding("ports", "ok", "none is fixed: free ones are taken")
    if config.stack.host in OPEN_HOSTS:
        yield Finding("ports: host", "warn", f"{config.stack.host}: whoever reaches this machine reaches services that ask for no password",
                      'right inside a container whose ports are published on 127.0.0.1; elsewhere set stack.host to "127.0.0.1"')
