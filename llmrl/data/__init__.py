"""Rows into token ids: reading, checking, rendering, tokenising, ordering. Nothing here knows of models or losses."""
