"""Everything that knows about more than one device.

Layout. mesh.py makes the device mesh; sharding.py is the table from logical dimensions to mesh axes
and what looks things up in it; shards.py runs a function on each device's own shard, for code that
writes its collectives by hand.

Code with collectives. expert_parallel.py brings tokens to the devices of their experts and back,
with the permutations of routing_plan.py. context.py splits sequences along their length, and
split_cache.py what decoding keeps of them. sharded_attention.py runs the attention kernel where
sequences are whole, sharded_sparse_attention.py attention to chosen keys wherever they are.
vocabulary_parallel.py looks up embeddings inside a pipeline.

Pipelines. stages.py deals layers out to stages, schedules.py says which stage does what in which
order, timetable.py checks and times a schedule, lockstep.py turns it into ticks that all ranks
share, pipeline.py executes those.

Machines. processes.py joins several processes into one program, with lifeline.py to notice that one
has ended; compilation.py compiles a step once per batch shape; replicas.py compares copies that
should be equal; eplb.py places replicas of experts for serving, and expert_slots.py moves their
weights there and says which replica serves a token.
"""
