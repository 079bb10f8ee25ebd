"""Rows in, token ids and labels out: load → format → tokenize → pack → collate, cached by content.

Each stage is one module and can be used alone; `pipeline.prepare` joins the ones after loading.
"""
