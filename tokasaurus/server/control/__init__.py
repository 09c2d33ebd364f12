"""Control of a running engine over HTTP: commands, and the files of new weights."""
