"""From raw text to text worth training on, in stages whose files can be looked at.

  recipe.py     sources, rules and options: what the user decides
  stages.py     runs a stage over shards, on any number of workers, and goes on after a kill
  shards.py     parquet files of documents or of numbers about them
  reading.py    stage `read`: files of any kind to shards of documents
  words.py      cuts a text into words, Chinese into characters
  signals.py    measures a text: lengths, lines, repetition; code.py measures source code
  language.py   identifies the language of prose
  rules.py      thresholds per kind and language; the first that fails removes a document
  tagging.py    stage `tag`: writes measures beside the text, never decisions
  deciding.py   stage `rules`: the first rule that each document fails, and distributions
  repositories.py, joining.py   stage `join`: the files of a repository in one document
  decontaminating.py  stages `evaluation` and `contaminated`: what quotes evaluation files
  shingles.py   texts as sets of shingles, MinHash, Jaccard similarity
  duplicates.py which of several equal or alike documents stays
  deduplicating.py  stages `buckets`, `shingles` and `duplicates`
  passages.py   cuts out passages that occurred before
  personal.py   replaces addresses and keys
  renaming.py   other names for the variables of Python functions
  sampling.py   choices by hash
  writing.py    stage `text`: kept documents to train and held-out files, samples for the report
  tokenizing.py the result in the cache that training reads
  report.py     the funnel, histograms and samples: report.json, report.html
  pipeline.py   all stages in order
  classifier.py tells texts that are like some from others
  mining.py     finds texts like a seed in a pool, in rounds
  prepare.py    from a recipe to a folder, with a lock and a report

Each stage reads files and writes files, named by the number of their shard. A document's fate
depends on the recipe and the texts alone, so the output is the same, byte for byte, on any number
of workers. No file imports jax.
"""
