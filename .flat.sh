one() { echo -n "$*: "; vhost-vdpa ladder --profile mlx5-2025 --rows beyond --json "$@" 2>/dev/null | python3 -c 'import json,sys; r=json.load(sys.stdin)["rows"][0]; print("stop_to_run", r["stop_to_run_ms"], "floor", r["floor_ms"], "dt1", r["dt1_ms"]["worst"], r["stop_to_run_parts_ms"])'; }
B="--pairs 2 --memory 1G --charge 256G"
one --devices 1 $B
one --devices 8 $B
for m in 256M 4G; do one --devices 1 --pairs 2 --memory $m --charge 256G; done
for c in 8G 1024G; do one --devices 1 --pairs 2 --memory 1G --charge $c; done
for r in 1 64 255; do one --devices 1 $B --regions $r; done
for p in 1 4 8 16; do one --devices 1 --pairs $p --memory 1G --charge 256G; done
