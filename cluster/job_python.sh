#!/bin/sh
# Runs `python -m pipeline` in a Ray job with a Python that has the application: the one on the PATH of Ray's processes, or the
# one that Ray itself runs with, which is not on it where Ray was started as `.venv/bin/ray start`.
#
#     sh cluster/job_python.sh PID ARGUMENT...     PID: the process of Ray that runs the job

ray_process=$1
shift
of_ray=$(sed -n 's#^.* \(/.*\)/lib/python[0-9.]*/site-packages/ray/_raylet\..*$#\1/bin/python#p' "/proc/$ray_process/maps" 2>/dev/null | head -n 1)
for python in python "$of_ray"; do
    if [ -n "$python" ] && "$python" -c '
import importlib.util, sys
sys.exit(not all(map(importlib.util.find_spec, ("typer", "ray", "torch", "diffusers"))))' 2>/dev/null; then
        exec "$python" -m pipeline "$@"
    fi
done
echo "error: this python has no reelquant[application]: neither \`python\` on Ray's PATH ($(command -v python || echo none)) nor" \
    "Ray's own (${of_ray:-unknown}): start Ray from the environment that has, such as PATH=/path/to/.venv/bin:\$PATH ray start"
exit 1
