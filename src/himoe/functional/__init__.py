"""Pure tensor mathematics: scores, selection, losses, dispatch, statistics, and the reference they are tested with."""
