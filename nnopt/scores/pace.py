"""How many candidates an engine has in hand at once, on each platform."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Pace:
    """The arguments of `FisherEngine.stream` that change how fast it is, and nothing else but rounding.

    Attributes:
        lanes: candidates that run side by side in one row of programs (`scores.lanes`).
        ahead: rows that are under way while the results of the one before are waited for.
    """

    lanes: int = 1
    ahead: int = 0

    @classmethod
    def on(cls, platform: str) -> "Pace":
        """What a stream of random candidates runs at by default.

        One lane everywhere. On a CPU several were measured to gain nothing: one candidate fills the cores. On an accelerator they
        have not been measured, and the count speaks against few: of eight candidates drawn from some 20 choices at a position,
        hardly two have the same module there, so nearly every lane is taken out and put back alone, in more launches than without.
        Where there are enough lanes to share modules (64 and more), each program is compiled at each power of two up to their
        number: minutes, where a thousand candidates take seconds. Whoever streams candidates that differ at few positions, or
        many thousands of them, gives `lanes` to `stream`. An accelerator works while the host prepares the next, hence `ahead`.

        Args:
            platform: `cpu`, or any accelerator's name.
        """
        return cls() if platform == "cpu" else cls(ahead=8)
