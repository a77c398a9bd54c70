"""A small streaming reverse proxy over one or more local Triton replicas: one address, whatever stands behind it. Standard library only.

    python -m tide_pipeline.serve.front --replicas FILE --state-file FILE [--host 127.0.0.1] [--port 0] [--body-bytes N ...]

    /v2/models/...           metadata, config, stats, generate, generate_stream: to the least busy ready replica
    /v2/health/ready         200 while at least one replica takes requests
    /front/status            JSON: replicas, what is in flight, served, refused (see Front.status)

    replicas.py        the file that tells replicas, weights and drain; readiness; whose turn it is
    visit.py           one client's connection: limits, which paths there are
    check.py           what a generate request may hold
    relay.py           one request to one replica and back; all limits
    wire.py            one connection to a replica; answers copied as they come
    http.py            HTTP/1.1

It listens where it is told, knows no users and speaks no TLS: keep it on loopback, or behind what does. A client that shuts its sending
side counts as one that has left. Exit codes: 0 stopped by a signal, 2 could not start.
"""
