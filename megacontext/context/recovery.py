"""Opening a tree on disk: which of its tokens the checksums bear out, and how a writer makes the files agree again.

`examine` only reads. Its steps:

    1. Read the commits and the sizes of the files, again if a writer at work has committed meanwhile.
    2. Check the newest flushed commit F. Its data was on the disk itself, so a crash cannot have taken any of it. F is
       borne out when ids.bin is long enough, and these fit their crc: the last append, the incomplete block, each of
       the newest blocks, and all ids together. Of a closed tree beyond 2^24 tokens only the newest 2^20 are read. The
       others, like the older records of step 8, are compared when they are read, and by `verify`.
    3. Blocks that do not fit ids.crc while the crc of all ids fits: ids.crc is damaged, the ids are not. A writer makes
       ids.crc anew.
    4. F is not borne out: that is damage. The state is the longest prefix that is borne out. A reader shows it, a
       writer refuses it unless it was told to salvage.
    5. F is borne out: the state is the newest commit that is borne out too, F or one that was not flushed.
    6. Commits newer than the state: a power cut took ids of their appends, or a copy of an open tree stopped early.
       Blocks behind the state that have their crc are kept.
    7. Ids behind the newest commit: an append that was announced and did not finish is dropped as a whole. Blocks that
       no announcement explains lost their commit to a power cut; those that have their crc are kept.
    8. Records of each level are kept up to the first that does not have its crc: the newest 8 MiB of a file are
       checked, and all since F. The tree makes the others anew from the ids.

`repair` does what `examine` found: it copies ids that no interrupted append explains to a file of their own, cuts the
files to the state, and makes ids.crc anew where it is damaged.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from megacontext.context.disk_files import Commit
from megacontext.context.store import Recovery
from megacontext.context.tree_files import TreeFiles

CHECKED_TOKENS = 1 << 20  # newest ids whose block checksums are compared whenever a tree is opened
CHECKED_IN_ALL = 1 << 24  # tokens of the longest tree all of whose ids are read whenever it is opened
CHECKED_BYTES = 1 << 23  # newest bytes of each level file that are compared whenever a tree is opened
_TRIES = 100


@dataclass(frozen=True)
class Finding:
    """What `examine` found.

    `commit` is the state; `flushed` its tokens that are on the disk itself; `counts` the records kept of each level.
    `latest` is the highest sequence number of any commit, `safe` that of the flushed commit that must not be overwritten
    next. `damage` says what is wrong with flushed data, "" if nothing is. `crcs_wrong`: ids.crc has to be made anew.
    `cut_aside`: ids behind the state are no interrupted append. `as_stored`: commit.bin says exactly this state.
    `commits_lost`: commit.bin lacks the newest commit, which commit.copy has.
    `unchecked` ids at the start, and `unchecked_records` of each level, were not compared with their checksums.
    """

    commit: Commit
    flushed: int
    counts: list[int]
    latest: int
    safe: int
    damage: str
    crcs_wrong: bool
    cut_aside: bool
    as_stored: bool
    commits_lost: bool
    unchecked: int
    unchecked_records: list[int]
    recovery: Recovery

    @property
    def clean(self) -> bool:
        """Whether the files need no repair."""
        return self.as_stored and self.recovery.clean and not self.crcs_wrong


def examine(files: TreeFiles, thorough: bool = False) -> Finding:
    """Steps 1 to 8. `thorough` leaves nothing to later checks. OSError passes through."""
    return _Examination(files, thorough).finding()


def repair(files: TreeFiles, finding: Finding) -> Path | None:
    """Make the files agree with the state that was found; returns the file that keeps what was cut from ids.bin."""
    tokens = finding.commit.tokens
    kept = copy_aside(files.ids.path, 4 * tokens, f".from-{tokens}") if finding.cut_aside else None
    files.cut(tokens, finding.counts)
    if finding.crcs_wrong:
        files.write_crcs(0, tokens // files.spec.block_size)
    return kept


class _Examination:
    def __init__(self, files: TreeFiles, thorough: bool) -> None:
        self.files, self.thorough, self.r = files, thorough, files.spec.block_size
        for _ in range(_TRIES):  # step 1
            in_place, copied = files.slots.read(), files.copy.read()
            self.announced = files.slots.announced()
            self.held, self.crcs_held = files.ids.held(), files.crcs.held()
            if in_place == files.slots.read():
                break
        both = sorted([*in_place, *copied], key=lambda item: -item[0].sequence)
        self.in_place, self.commits = [commit for commit, _ in in_place], [commit for commit, _ in both]
        self.flushed = next((commit for commit, was_flushed in both if was_flushed), Commit(0, 0, 0, 0))
        self.crcs_wrong = False
        self.unchecked = 0

    def finding(self) -> Finding:
        damage, cut_aside = self._damage(), True
        if damage:
            state = self._state(self._intact_prefix(), self.flushed)
        else:
            state, cut_aside = self._newest_state()
        counts, unchecked = self._counts(state.tokens)
        records = sum(file.held() - kept for file, kept in zip(self.files.levels, counts, strict=True))
        dropped = max(0, self.held - state.tokens)
        return Finding(
            commit=state,
            flushed=min(self.flushed.tokens, state.tokens),
            counts=counts,
            latest=self.commits[0].sequence if self.commits else 0,
            safe=self.flushed.sequence,
            damage=damage,
            crcs_wrong=self.crcs_wrong,
            cut_aside=cut_aside and dropped > 0,
            as_stored=bool(self.in_place) and self.in_place[0] == state,
            commits_lost=self.in_place[:1] != self.commits[:1],
            unchecked=self.unchecked,
            unchecked_records=unchecked,
            recovery=Recovery(state.tokens, dropped, records),
        )

    def _damage(self) -> str:
        """Steps 2 and 3: what is wrong with flushed data, "" if nothing is."""
        flushed, files = self.flushed, self.files
        blocks = flushed.tokens // self.r
        closed = self.held == flushed.tokens and self.commits[:1] in ([], [flushed])
        everything = self.thorough or flushed.all_crc is None
        since = 0 if everything else max(0, blocks - CHECKED_TOKENS // self.r)
        everything = everything or not closed or flushed.tokens <= CHECKED_IN_ALL
        if self._borne_out(flushed, since, everything):
            self.unchecked = 0 if everything or self.crcs_wrong else since * self.r
            return ""
        if self.held < flushed.tokens:
            return f"{str(files.ids.path)!r} holds {self.held:,} of the {flushed.tokens:,} ids that were stored safely."
        good = files.good_blocks(0, min(blocks, self.crcs_held))
        if good == self.crcs_held < blocks:
            return f"{str(files.crcs.path)!r} holds {self.crcs_held:,} of the {blocks:,} checksums that were stored safely."
        if good == blocks and self._intact_prefix() == flushed.tokens:
            return f"{str(files.ids.path)!r} and {str(files.crcs.path)!r} are not those of 'commit.bin'."
        where = f"ids [{good * self.r:,}, {min(flushed.tokens, (good + 1) * self.r):,})"
        return f"{where} in {str(files.ids.path)!r} were stored safely and have changed since."

    def _borne_out(self, commit: Commit, since: int, everything: bool) -> bool:
        """Whether the ids are those of a commit, looking at blocks from `since` on, or at `everything`."""
        if commit.tokens > self.held or not self.files.fits(commit):
            return False
        blocks = commit.tokens // self.r
        by_blocks = blocks <= self.crcs_held and self.files.good_blocks(since, blocks) == blocks
        if by_blocks and not (everything and commit.all_crc is not None):
            return True
        if commit.all_crc is None or self.files.ids_crc(0, commit.tokens) != commit.all_crc:
            return False
        self.crcs_wrong = self.crcs_wrong or not by_blocks
        return True

    def _intact_prefix(self) -> int:
        """Step 4: tokens of the longest prefix that block checksums, or those and a commit, bear out."""
        limit = min(self.held, self.flushed.tokens)
        blocks = self.files.good_blocks(0, min(limit // self.r, self.crcs_held))
        tails = [
            commit.tokens
            for commit in self.commits
            if commit.tokens // self.r == blocks
            and commit.tokens <= limit
            and commit.tail_crc is not None
            and self.files.fits(commit)
        ]
        return max([blocks * self.r, *tails])

    def _newest_state(self) -> tuple[Commit, bool]:
        """Steps 5 to 7: the state, and whether what lies behind it is no interrupted append."""
        flushed, r = self.flushed, self.r
        since = flushed.tokens // r
        later = [commit for commit in self.commits if commit.sequence >= flushed.sequence]
        state = next((c for c in later if c.sequence > flushed.sequence and self._borne_out(c, since, False)), flushed)
        lost = [commit for commit in later if commit.sequence > state.sequence]
        blocks_held = min(self.held // r, self.crcs_held)
        good = state.tokens // r if self.crcs_wrong else self.files.good_blocks(since, max(since, blocks_held))
        if lost:
            return self._state(max(state.tokens, min(good, lost[0].tokens // r) * r), state), True
        known = self.announced
        explained = known is not None and known.start == state.tokens and self.held <= known.tokens
        if explained or self.held // r <= state.tokens // r:
            return self._state(state.tokens, state), False
        return self._state(max(state.tokens, good * r), state), True

    def _state(self, tokens: int, base: Commit) -> Commit:
        """The commit of the first `tokens` ids: `base` if it is that, and says everything."""
        if base.tokens == tokens and base.all_crc is not None:
            return base
        whole, files = tokens // self.r * self.r, self.files
        start = base.start if base.tokens == tokens else tokens
        return replace(
            base,
            start=start,
            tokens=tokens,
            append_crc=files.ids_crc(start, tokens),
            tail_crc=files.ids_crc(whole, tokens),
            all_crc=files.ids_crc(0, tokens),
        )

    def _counts(self, tokens: int) -> tuple[list[int], list[int]]:
        """Step 8: records of each level to keep, and how many of them, at the start, were not checked."""
        counts, unchecked = [], []
        for level, file in enumerate(self.files.levels, 1):
            keep = min(file.held(), tokens // self.r**level)
            safe = min(keep, self.flushed.tokens // self.r**level)
            unchecked.append(0 if self.thorough else max(0, safe - CHECKED_BYTES // file.stride))
            counts.append(self.files.good_records(level, unchecked[-1], keep))
        return counts, unchecked


def copy_aside(path: Path, start: int = 0, suffix: str = "") -> Path:
    """Copy a file's bytes from `start` on to a new file beside it, `<name>.damaged-<n><suffix>`, on the disk itself."""
    target = _free_name(path, suffix)
    with open(path, "rb") as source, open(target, "xb") as sink:
        source.seek(start)
        shutil.copyfileobj(source, sink, 1 << 22)
        sink.flush()
        os.fsync(sink.fileno())
    return target


def move_aside(path: Path) -> Path:
    """Rename a damaged file, so that it is kept while another takes its place."""
    target = _free_name(path)
    path.rename(target)
    return target


def _free_name(path: Path, suffix: str = "") -> Path:
    number = 1
    while any(path.parent.glob(f"{path.name}.damaged-{number}*")):
        number += 1
    return path.with_name(f"{path.name}.damaged-{number}{suffix}")
