"""The index by itself: an extendible hash table in a file, beside a dict."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from crashes import Machine
from dbm_bitcask.engine import header as at
from dbm_bitcask.engine import keydir as module
from dbm_bitcask.engine import page as page_module
from dbm_bitcask.engine.errors import error
from dbm_bitcask.engine.files import Directory, temporary_file
from dbm_bitcask.engine.header import BASE, PAGE_SIZE, PAGE_WORDS, ROW_WORDS
from dbm_bitcask.engine.keydir import Keydir
from dbm_bitcask.engine.page import (
    FULL,
    IN_USE,
    PAGE_CHECKSUM,
    PAGE_COUNTS,
    PAGE_DEPTH,
    PAGE_MAGIC,
    SLOTS,
    UNUSED,
    Damaged,
    page_checksum,
    page_counts,
    page_depth,
    page_slots,
    probe,
)

SEGMENT = 7
TOP = 2**64 - 1


def location(number):
    return SEGMENT << 32 | number


@pytest.fixture
def keydir():
    return fresh()


def fresh(file=None):
    keydir = Keydir.create(file or temporary_file(), 1)
    keydir.listed = {SEGMENT}
    return keydir


def add_row(keydir, segment):
    keydir.add_rows([segment])
    return keydir.rows()[segment]


def reopened(file):
    """Another handle on the same file."""
    keydir = Keydir(file, module.map_words(file, file.size(), write=True), write=True)
    keydir.listed = {SEGMENT}
    return keydir


def put(keydir, hashed, where):
    place = keydir.room(hashed)
    keydir.store(place.found[0] if place.found else place.free, hashed, where)


def delete(keydir, hashed):
    found = probe(keydir.table, hashed).found
    if found:
        keydir.store(found[0], hashed, 0)


def get(keydir, hashed):
    return [keydir.words[slot] for slot in probe(keydir.table, hashed).found]


def fill(keydir, hashes):
    for number, hashed in enumerate(hashes, 1):
        put(keydir, hashed, location(number))
    return {hashed: location(number) for number, hashed in enumerate(hashes, 1)}


def contents(keydir):
    """Every slot, found by way of the directory."""
    return dict(slot for page in keydir.pages() for slot in page_slots(keydir.words, page))


def random_hashes(count, seed=1):
    chance = random.Random(seed)
    return [chance.randrange(1, 2**64) for _ in range(count)]


def hashes_below(prefix, bits, count, seed=1):
    """Hashes that begin with the same bits."""
    return [prefix << 64 - bits | hashed >> bits for hashed in random_hashes(count, seed)]


def free_list(keydir):
    words, page, found = keydir.words, keydir.words[at.FREE], []
    while page:
        assert words[page * PAGE_WORDS + PAGE_MAGIC] == UNUSED
        found.append(page)
        page = words[page * PAGE_WORDS + PAGE_CHECKSUM]
    return found


def directories(keydir):
    """The pages that hold the directory, or held it before it was doubled: nothing is ever written there again."""
    depth = keydir.words[at.ROOT] >> 32
    return sum(-(-((1 << each) + (1 << each - 9)) // PAGE_WORDS) for each in range(9, depth + 1))


def require_sound(keydir, expected, *, garbage=0):
    """Everything that has to hold of an index between two operations. `garbage` is how many pages may have been lost."""
    words = keydir.words
    assert contents(keydir) == expected
    used = list(keydir.pages())
    assert len(set(used)) == len(used)
    for page in used:
        assert words[page * PAGE_WORDS + PAGE_MAGIC] == IN_USE
        assert words[page * PAGE_WORDS + PAGE_COUNTS] == page_counts(words, page)
        depth = page_depth(words, page)
        assert len({hashed >> 64 - depth for hashed, _ in page_slots(words, page)}) <= 1
    for hashed, where in expected.items():
        assert get(keydir, hashed) == [where]
    directory, shift = keydir.table.directory, keydir.table.shift
    shares = Counter((directory[index] & BASE) // PAGE_WORDS for index in range(1 << 64 - shift))
    assert all(shares[page] == 1 << 64 - shift - page_depth(words, page) for page in used)
    tables = 1 if words[at.TABLE] >> 32 == 1 else 2 * (words[at.TABLE] >> 32) - 1
    free = free_list(keydir)
    assert not set(free) & set(used)
    leaked = words[at.PAGES] - (1 + tables + directories(keydir) + len(used) + len(free))
    assert 0 <= leaked <= garbage
    assert words[at.PAGES] <= words[at.CAPACITY] <= keydir.file.size() // PAGE_SIZE


# Beside a dict


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 2**32 - 1))), st.sampled_from([0, 1 << 63, TOP - 100, 0x1F0]))
def test_slots_of_few_hashes_are_those_of_a_dict(changes, base):
    keydir, model = fresh(), {}
    for number, where in changes:
        hashed = base + number or 1
        if where % 3:
            put(keydir, hashed, location(where))
            model[hashed] = location(where)
        else:
            delete(keydir, hashed)
            model.pop(hashed, None)
    require_sound(keydir, model)


class BesideADict(RuleBasedStateMachine):
    """Many hashes, some of which begin alike, so that pages split and the directory doubles."""

    @initialize(seed=st.integers(0, 2**32))
    def create(self, seed):
        self.keydir = fresh()
        self.model = {}
        self.chance = random.Random(seed)
        self.number = 0

    @rule(count=st.integers(1, 400), bits=st.sampled_from([0, 0, 3, 8, 10]))
    def insert(self, count, bits):
        prefix = self.chance.getrandbits(bits)
        for _ in range(count):
            hashed = prefix << 64 - bits | self.chance.getrandbits(64 - bits) or 1
            self.number += 1
            put(self.keydir, hashed, location(self.number))
            self.model[hashed] = location(self.number)

    @precondition(lambda self: self.model)
    @rule(part=st.integers(1, 10))
    def overwrite(self, part):
        for hashed in list(self.model)[::part]:
            self.number += 1
            put(self.keydir, hashed, location(self.number))
            self.model[hashed] = location(self.number)

    @precondition(lambda self: self.model)
    @rule(part=st.integers(1, 4))
    def delete(self, part):
        for hashed in list(self.model)[::part]:
            delete(self.keydir, hashed)
            del self.model[hashed]

    @rule(limit=st.integers(0, 50))
    def seal(self, limit):
        self.keydir.seal(limit)

    @rule()
    def go_over_to_another_handle(self):
        self.keydir.seal(1000)
        self.keydir = reopened(self.keydir.file)

    @invariant()
    def compare(self):
        if hasattr(self, "keydir"):
            require_sound(self.keydir, self.model)


BesideADict.TestCase.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)
TestBesideADict = BesideADict.TestCase


@pytest.mark.parametrize("count", [0, 1, FULL, FULL + 1, 1000, 20_000])
def test_hashes_are_found_and_others_are_not(keydir, count):
    hashes = random_hashes(2 * count)
    require_sound(keydir, fill(keydir, hashes[:count]))
    assert [hashed for hashed in hashes[count:] if get(keydir, hashed)] == []


@pytest.mark.parametrize("hashed", [1, 2, 3, 4, 6, 0x1FE, 0x1FF, TOP, TOP - 1, 1 << 63, IN_USE, UNUSED])
def test_every_hash_will_do(keydir, hashed):
    """Also one whose first slot would be where the head of the page stands, at the very end of it, or equal to a word of the head."""
    others = [hashed ^ 1 << bit for bit in range(9, 63)]
    model = fill(keydir, [hashed, *others])
    require_sound(keydir, model)
    delete(keydir, hashed)
    del model[hashed]
    require_sound(keydir, model)


def test_two_keys_of_one_hash_have_a_slot_each(keydir):
    for number in (1, 2, 3):
        keydir.store(keydir.room(99).free, 99, location(number))
    assert sorted(get(keydir, 99)) == [location(1), location(2), location(3)]
    fill(keydir, random_hashes(2 * SLOTS))
    assert sorted(get(keydir, 99)) == [location(1), location(2), location(3)]


# Pages


def test_full_page_is_split_in_two(keydir):
    hashes = random_hashes(FULL)
    fill(keydir, hashes)
    assert len(list(keydir.pages())) == 1
    put(keydir, 12345, location(9999))
    assert [page_depth(keydir.words, page) for page in keydir.pages()] == [1, 1]


def test_page_is_never_more_than_three_quarters_full(keydir):
    for hashed in hashes_below(5, 9, 2000):
        put(keydir, hashed, location(1))
        assert all(keydir.words[page * PAGE_WORDS + PAGE_COUNTS] & 0xFFFF <= FULL for page in keydir.pages())


def test_page_of_deleted_slots_is_made_anew_and_not_split(keydir):
    kept = fill(keydir, random_hashes(10))
    for turn in range(20):
        hashes = random_hashes(FULL, seed=turn + 2)
        for hashed in hashes:
            put(keydir, hashed, location(1))
            delete(keydir, hashed)
    require_sound(keydir, kept)
    assert len(list(keydir.pages())) == 1
    assert keydir.words[at.PAGES] <= 6  # two pages take turns


def test_deleted_slot_is_used_again(keydir):
    fill(keydir, [5])
    [slot] = probe(keydir.table, 5).found
    delete(keydir, 5)
    assert probe(keydir.table, 5).free == slot
    put(keydir, 5 + 512, location(2))
    assert probe(keydir.table, 5 + 512).found == [slot]
    require_sound(keydir, {5 + 512: location(2)})


def test_slots_never_move_within_a_page(keydir):
    """A reader without a lock goes from slot to slot: what it has passed must not come behind it."""
    chance = random.Random(3)
    hashes = random_hashes(600)
    slots = {}
    moved_with_its_page = 0
    for step in range(6000):
        hashed = chance.choice(hashes)
        if step % 3:
            put(keydir, hashed, location(step))
            [slot] = probe(keydir.table, hashed).found
            entry = keydir.table.directory[hashed >> keydir.table.shift]
            moved_with_its_page += slots.get(hashed, (entry, 0))[0] != entry
            if slots.get(hashed, (0, 0))[0] == entry:
                assert slots[hashed][1] == slot
            slots[hashed] = entry, slot
        else:
            delete(keydir, hashed)
            slots.pop(hashed, None)
    for hashed, (entry, slot) in slots.items():
        if keydir.table.directory[hashed >> keydir.table.shift] == entry:
            assert probe(keydir.table, hashed).found == [slot]
    assert moved_with_its_page


def test_slot_is_stored_hash_first(keydir):
    """The hash of a slot that is not there yet never leads to a location."""
    seen = []

    class Watched:
        def __getitem__(self, where):
            return keydir_words[where]

        def __setitem__(self, where, what):
            seen.append((where, what))
            keydir_words[where] = what

    keydir_words = keydir.words
    slot = keydir.room(77).free
    keydir.words = Watched()
    keydir.store(slot, 77, location(1))
    keydir.words = keydir_words
    assert seen[-2:] == [(slot - 1, 77), (slot, location(1))]


# The directory


def test_entry_has_a_new_version_whenever_it_is_swung(keydir):
    versions = Counter()
    for number, hashed in enumerate(random_hashes(3000)):
        before = keydir.table.directory[: 1 << 9].tolist()
        put(keydir, hashed, location(number + 1))
        after = keydir.table.directory[: 1 << 9].tolist()
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            if old & BASE != new & BASE:
                assert new >> 41 == (old >> 41) + 1
                versions[index] += 1
            else:
                assert old == new
    assert versions.total() > 512


def test_version_starts_again_at_its_end(keydir):
    for index in range(512):
        keydir.table.directory[index] |= (2**23 - 1) << 41
    model = fill(keydir, random_hashes(FULL + 1))
    assert {entry >> 41 for entry in keydir.table.directory[:512].tolist()} == {0}
    require_sound(keydir, model)


def test_directory_doubles_when_a_page_is_as_deep_as_it(keydir):
    model = fill(keydir, hashes_below(0b101, 9, FULL + 1))
    assert keydir.table.shift == 64 - 10
    require_sound(keydir, model)
    model |= {hashed: location(1) for hashed in hashes_below(0b1011, 10, 3 * FULL, seed=2)}
    for hashed in hashes_below(0b1011, 10, 3 * FULL, seed=2):
        put(keydir, hashed, location(1))
    assert keydir.table.shift < 64 - 11
    require_sound(keydir, model)


def test_outgrown_directory_stays_as_it_is(keydir):
    """A reader may be in it for as long as it likes."""
    fill(keydir, hashes_below(7, 9, FULL))
    while keydir.table.shift == 64 - 9:
        old, image = keydir.table.directory, keydir.table.directory.tolist()
        put(keydir, hashes_below(7, 9, 1, seed=99)[0], location(1))
    image = old.tolist()
    fill(keydir, random_hashes(5000))
    assert old.tolist() == image


def test_too_many_equal_beginnings_are_an_error_and_change_nothing(keydir, monkeypatch):
    monkeypatch.setattr(module, "_MAX_DEPTH", 11)
    hashes = hashes_below(1, 40, FULL + 1)
    model = fill(keydir, hashes[:FULL])
    for _ in range(2):
        with pytest.raises(error, match="cannot grow"):
            put(keydir, hashes[FULL], location(1))
        require_sound(keydir, model)
    put(keydir, TOP, location(2))
    require_sound(keydir, {**model, TOP: location(2)})


def test_replaced_pages_are_used_again(keydir):
    fill(keydir, random_hashes(20_000))
    words = keydir.words
    assert len(free_list(keydir)) <= 1
    assert words[at.PAGES] <= 4 + len(list(keydir.pages())) + 1


def test_hashes_of_a_segment_that_is_gone_make_room(keydir):
    """After `clear` every slot is one of a segment that is not listed: pages are made anew instead of split."""
    fill(keydir, random_hashes(1000))
    pages = len(list(keydir.pages()))
    keydir.listed = {SEGMENT + 1}
    hashes = random_hashes(400, seed=5)
    for hashed in hashes:
        put(keydir, hashed, SEGMENT + 1 << 32 | 32)
    assert len(list(keydir.pages())) <= pages
    assert contents(keydir).items() >= dict.fromkeys(hashes, SEGMENT + 1 << 32 | 32).items()


def test_file_that_cannot_grow_is_an_os_error_and_nothing_is_lost(keydir, monkeypatch):
    model = {}
    full = False

    def reserve(offset, length):
        if full:
            raise OSError(28, "No space left on device")
        grow(offset, length)

    grow = keydir.file.reserve
    monkeypatch.setattr(keydir.file, "reserve", reserve)
    hashes = iter(random_hashes(5000))
    for full in (False, True):
        try:
            for hashed in itertools.islice(hashes, 2000):
                put(keydir, hashed, location(1))
                model[hashed] = location(1)
        except OSError:
            assert full
        require_sound(keydir, model)
    for hashed in list(model)[::2]:
        delete(keydir, hashed)
        del model[hashed]
    require_sound(keydir, model)
    full = False
    for hashed in hashes:
        put(keydir, hashed, location(2))
        model[hashed] = location(2)
    require_sound(keydir, model)


# Other handles


def test_another_handle_sees_everything_after_a_refresh(keydir):
    other = reopened(keydir.file)
    hashes = random_hashes(6000)
    for turn in range(6):
        for hashed in hashes[turn * 1000 : (turn + 1) * 1000]:
            put(keydir, hashed, location(1))
        other.refresh()
        require_sound(other, dict.fromkeys(hashes[: (turn + 1) * 1000], location(1)))


def test_handle_that_did_not_refresh_finds_what_is_put_into_split_pages(keydir):
    """As long as the epoch stays, there is nothing to catch up with."""
    other = reopened(keydir.file)
    epoch = keydir.words[at.EPOCH]
    model = fill(keydir, random_hashes(2 * FULL))
    assert len(list(keydir.pages())) > 1
    assert keydir.words[at.EPOCH] == epoch
    require_sound(other, model)


def test_epoch_moves_when_file_or_directory_grow(keydir):
    epoch, capacity, root = (keydir.words[word] for word in (at.EPOCH, at.CAPACITY, at.ROOT))
    for hashed in hashes_below(3, 9, 2000):
        put(keydir, hashed, location(1))
        now = tuple(keydir.words[word] for word in (at.EPOCH, at.CAPACITY, at.ROOT))
        assert (now[0] > epoch) == (now[1:] != (capacity, root))
        epoch, capacity, root = now


def test_two_handles_take_turns(keydir):
    handles = [keydir, reopened(keydir.file)]
    model = {}
    for number, hashed in enumerate(random_hashes(3000), 1):
        handle = handles[number % 2]
        handle.refresh()
        put(handle, hashed, location(number))
        model[hashed] = location(number)
    for handle in handles:
        handle.refresh()
        require_sound(handle, model)


# Checksums


def test_fence_stands_between_what_a_split_fills_and_what_leads_there(keydir, monkeypatch):
    """Where a processor does not keep stores in order, an entry must not be seen before the slots that it leads to."""
    entries = []
    monkeypatch.setattr(module, "fence", lambda: entries.append([keydir.table.directory[0] & BASE, contents(keydir)]))
    expected = fill(keydir, random_hashes(FULL))
    page = keydir.table.directory[0] & BASE
    assert entries == []
    put(keydir, 1, location(FULL + 1))
    assert entries == [[page, expected]]
    assert keydir.table.directory[0] & BASE != page


def test_fence_stands_between_a_search_and_the_look_whether_it_is_valid(keydir, monkeypatch):
    fences = []
    monkeypatch.setattr(page_module, "fence", lambda: fences.append(1))
    probe(keydir.table, 1)
    assert fences == [1]


@pytest.fixture
def sealed(tmp_path):
    """The bytes of a sealed index of a few pages, and what is in it."""
    file = Directory(str(tmp_path)).create("keydir", 0o600)
    keydir = fresh(file)
    model = fill(keydir, random_hashes(500))
    assert keydir.seal(1000)
    return tmp_path / "keydir", model


def on_copy(path, data):
    path.write_bytes(data)
    return reopened(Directory(str(path.parent)).open(path.name, write=True))


def touch_all(keydir, model):
    for hashed in model:
        probe(keydir.table, hashed)


def test_sealed_index_verifies(sealed):
    path, model = sealed
    keydir = reopened(Directory(str(path.parent)).open("keydir", write=True))
    touch_all(keydir, model)
    assert all(keydir.words[page * PAGE_WORDS + PAGE_CHECKSUM] for page in keydir.pages())


def test_every_flipped_bit_of_a_sealed_page_is_damage(sealed):
    path, model = sealed
    good = path.read_bytes()
    keydir = on_copy(path.with_name("copy"), good)
    page = next(keydir.pages())
    hashed = next(hashed for hashed in model if probe(keydir.table, hashed).page == page)
    for bit in range(0, PAGE_SIZE * 8, 7):
        byte = page * PAGE_SIZE + bit // 8
        keydir.table.checked[hashed >> keydir.table.shift] = 0
        bytes_of = memoryview(keydir.words).cast("B")
        bytes_of[byte] ^= 1 << bit % 8
        if bit // 8 // 8 == PAGE_CHECKSUM and not keydir.words[page * PAGE_WORDS + PAGE_CHECKSUM]:
            continue
        with pytest.raises(Damaged):
            probe(keydir.table, hashed)
        bytes_of[byte] ^= 1 << bit % 8
    probe(keydir.table, hashed)


def test_every_flipped_bit_of_the_directory_is_damage_at_whichever_entry_of_it(sealed):
    path, model = sealed
    keydir = on_copy(path.with_name("copy"), path.read_bytes())
    hashes = sorted(model)
    start = (keydir.words[at.ROOT] & at.MASK32) * PAGE_WORDS
    bytes_of = memoryview(keydir.words).cast("B")
    for bit in range(0, (512 + 1) * 64, 11):
        byte = start * 8 + bit // 8
        bytes_of[byte] ^= 1 << bit % 8
        for hashed in (hashes[0], hashes[len(hashes) // 2], hashes[-1]):
            keydir.table.checked[hashed >> keydir.table.shift] = 0
            with pytest.raises(Damaged):
                probe(keydir.table, hashed)
        bytes_of[byte] ^= 1 << bit % 8
    touch_all(keydir, model)


def test_damage_is_found_at_the_first_touch_by_every_handle_and_not_looked_for_again(sealed):
    path, model = sealed
    data = bytearray(path.read_bytes())
    keydir = on_copy(path.with_name("copy"), bytes(data))
    pages = {probe(keydir.table, hashed).page: hashed for hashed in model}
    page, hashed = next(iter(pages.items()))
    keydir.words[page * PAGE_WORDS + 300] ^= 1
    probe(keydir.table, hashed)  # this handle was here before it happened
    other = reopened(keydir.file)
    for _ in range(2):
        with pytest.raises(Damaged):
            probe(other.table, hashed)
    for other_page, other_hashed in pages.items():
        if other_page != page:
            probe(other.table, other_hashed)


@pytest.mark.parametrize("filling", [b"\0", b"\xff", b"free\1\0\0\0"])
def test_page_that_is_overwritten_is_damage(sealed, filling):
    path, model = sealed
    keydir = on_copy(path.with_name("copy"), path.read_bytes())
    hashed = next(iter(model))
    page = probe(keydir.table, hashed).page
    memoryview(keydir.words).cast("B")[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = filling * (PAGE_SIZE // len(filling))
    with pytest.raises(Damaged):
        probe(reopened(keydir.file).table, hashed)


@pytest.mark.parametrize("entry", [0, BASE, TOP, 512, 10**6 * 512])
def test_entry_that_leads_nowhere_is_damage_and_no_index_error(sealed, entry):
    path, model = sealed
    keydir = on_copy(path.with_name("copy"), path.read_bytes())
    index = min(model) >> keydir.table.shift
    keydir.table.directory[index] = entry
    keydir.table.directory[512] = 0
    keydir.table.checked[index] = 0
    with pytest.raises(Damaged):
        probe(keydir.table, min(model))


def test_change_takes_the_checksum_off_the_page_and_seal_puts_it_on_again(sealed):
    path, model = sealed
    keydir = reopened(Directory(str(path.parent)).open("keydir", write=True))
    assert keydir.words[at.UNSEALED] == 0
    hashed = next(iter(model))
    page = probe(keydir.table, hashed).page
    put(keydir, hashed, location(4))
    assert keydir.words[page * PAGE_WORDS + PAGE_CHECKSUM] == 0
    assert keydir.words[at.UNSEALED] == 1
    assert keydir.seal(10)
    assert keydir.words[page * PAGE_WORDS + PAGE_CHECKSUM] == page_checksum(keydir.words, page)
    assert keydir.words[at.UNSEALED] == 0
    touch_all(reopened(keydir.file), model)


def test_seal_goes_in_slices(keydir):
    fill(keydir, random_hashes(3000))
    pages = set(keydir.pages())
    assert keydir.words[at.UNSEALED] == len(pages)
    slices = 0
    while not keydir.seal(3):
        slices += 1
    assert slices >= len(pages) // 3 - 1
    assert keydir.words[at.UNSEALED] == 0
    assert all(keydir.words[page * PAGE_WORDS + PAGE_CHECKSUM] == page_checksum(keydir.words, page) for page in pages)


def test_pages_that_another_handle_left_without_a_checksum_can_be_taken_over(keydir):
    model = fill(keydir, random_hashes(3000))
    other = reopened(keydir.file)
    other.touch_unsealed()
    assert other.seal(1000)
    assert other.words[at.UNSEALED] == 0
    third = reopened(keydir.file)
    touch_all(third, model)
    assert all(third.words[page * PAGE_WORDS + PAGE_CHECKSUM] for page in third.pages())


def test_directory_keeps_its_checksums_when_it_doubles(keydir):
    fill(keydir, hashes_below(3, 9, FULL))
    keydir.seal(1000)
    put(keydir, hashes_below(3, 9, 1, seed=4)[0], location(1))
    size = 1 << 64 - keydir.table.shift
    assert size > 512
    keydir.seal(1000)
    assert all(keydir.table.directory[size + chunk] for chunk in range(size // 512))
    touch_all(reopened(keydir.file), dict.fromkeys(range(1, 2**64, 2**52)))


# Bits that flip while there are no checksums


@pytest.fixture
def full(keydir):
    """An index of several pages of which one is full, and a hash that has its place there."""
    model = fill(keydir, random_hashes(700))
    hashes = iter(hashes_below(5, 3, 1000, seed=2))
    for number, hashed in enumerate(hashes, 1000):
        place = keydir.room(hashed)
        if keydir.words[place.page * PAGE_WORDS + PAGE_COUNTS] & 0xFFFF == FULL - 1:
            keydir.store(place.free, hashed, location(number))
            model[hashed] = location(number)
            return keydir, model, place.page, next(each for each in hashes if probe(keydir.table, each).page == place.page)
        put(keydir, hashed, location(number))
        model[hashed] = location(number)
    raise AssertionError


def require_refused(full, word, number):
    """With a number in a word, the next split is `Damaged`, and changes nothing."""
    keydir, model, _, hashed = full
    before, keydir.words[word] = keydir.words[word], number
    pages = {page: keydir.words[page * PAGE_WORDS : (page + 1) * PAGE_WORDS].tolist() for page in keydir.pages()}
    with pytest.raises(Damaged):
        put(keydir, hashed, location(9))
    assert {page: keydir.words[page * PAGE_WORDS : (page + 1) * PAGE_WORDS].tolist() for page in keydir.pages()} == pages
    keydir.words[word] = before
    require_sound(keydir, model)


def test_page_whose_depth_has_a_flipped_bit_is_never_split(full):
    keydir, model, page, hashed = full
    word = page * PAGE_WORDS + PAGE_DEPTH
    assert page_depth(keydir.words, page) in (2, 3)
    for bit in range(32):
        before = keydir.words[word]
        keydir.words[word] ^= 1 << bit
        with pytest.raises(Damaged, match=r"depth|deep"):
            put(keydir, hashed, location(9))
        keydir.words[word] = before
        require_sound(keydir, model)
    put(keydir, hashed, location(9))
    require_sound(keydir, {**model, hashed: location(9)})


def test_page_in_use_is_never_given_away(full):
    keydir, _, page, _ = full
    high_water = keydir.words[at.PAGES]
    unused = free_list(keydir)[0]
    for number in (page, 1, high_water + 1, 2**63):
        require_refused(full, at.FREE, number)
    require_refused(full, at.PAGES, max(keydir.pages()))
    require_refused(full, unused * PAGE_WORDS + PAGE_CHECKSUM, unused)  # twice


def test_split_is_not_finished_with_pages_that_are_not_there(keydir):
    for word in (at.SPLIT_OLD, at.SPLIT_LOW, at.SPLIT_HIGH, at.SPLIT_PAGES):
        for number in (2**40, keydir.words[at.CAPACITY] + (word == at.SPLIT_PAGES)):
            before, keydir.words[word] = keydir.words[word], number
            with pytest.raises(Damaged):
                keydir.finish_split()
            keydir.words[word] = before


@pytest.mark.parametrize("number", [0, FULL, 2**64 - 1])
def test_counts_of_a_page_may_be_any_number(keydir, number):
    hashes = random_hashes(20)
    fill(keydir, hashes)
    counts = (probe(keydir.table, hashes[0]).page) * PAGE_WORDS + PAGE_COUNTS
    for act in (lambda: delete(keydir, hashes[0]), lambda: put(keydir, hashes[0], location(99)), lambda: put(keydir, 99, location(1))):
        keydir.words[counts] = number
        act()
    assert contents(keydir) == {**{hashed: location(n) for n, hashed in enumerate(hashes, 1)}, hashes[0]: location(99), 99: location(1)}


def test_number_of_pages_without_a_checksum_may_be_too_small(keydir):
    fill(keydir, random_hashes(1000))
    keydir.words[at.UNSEALED] = 1
    assert keydir.seal(1000)
    assert keydir.words[at.UNSEALED] == 0


def test_table_is_whole_if_it_has_one_row_for_each_segment_of_numbers_that_can_be(keydir):
    keydir.listed = {1, 2, 300}
    keydir.add_rows([1, 2, 300])
    words, row, unused = keydir.words, keydir.rows()[2], max(keydir.rows().values()) + ROW_WORDS
    assert keydir.has_rows()
    for word, number in [(row, 3), (row, 1), (row, 0), (unused, 2), (row + at.ROW_DEAD, 2**63), (row + at.ROW_TOMBSTONES, 2**63)]:
        before, words[word] = words[word], number
        assert not keydir.has_rows()
        words[word] = before
    for table in (1, 2 | 1 << 32):
        before, words[at.TABLE] = words[at.TABLE], table
        assert not keydir.has_rows()
        words[at.TABLE] = before
    assert keydir.has_rows()


# The segment table


def test_rows_of_segments_that_are_gone_are_used_again(keydir):
    keydir.listed = set()
    rows = {}
    for number in range(1, 2000):
        keydir.listed = set(range(max(1, number - 5), number + 1))
        rows[number] = add_row(keydir, number)
        assert keydir.words[rows[number] + at.ROW_ID] == number
        keydir.words[rows[number] + at.ROW_DEAD] = number
    assert keydir.words[at.TABLE] == 1 | 1 << 32  # it never had to grow
    assert {number: keydir.words[row + at.ROW_DEAD] for number, row in keydir.rows().items()} == {n: n for n in range(1994, 2000)}


def test_row_that_is_used_again_is_empty(keydir):
    keydir.listed = {1}
    row = add_row(keydir, 1)
    keydir.words[row + at.ROW_DEAD] = keydir.words[row + at.ROW_TOMBSTONES] = 99
    keydir.listed = {2}
    assert add_row(keydir, 2) == row
    assert keydir.words[row : row + ROW_WORDS].tolist() == [2] + [0] * (ROW_WORDS - 1)


def test_row_of_a_segment_is_made_once(keydir):
    keydir.listed = {1, 2}
    assert len({add_row(keydir, 1), add_row(keydir, 2), add_row(keydir, 1)}) == 2


def test_table_grows_with_the_number_of_segments(keydir):
    model = fill(keydir, random_hashes(500))
    keydir.listed = set(range(1, 301))
    for number in range(1, 301):
        row = add_row(keydir, number)
        keydir.words[row + at.ROW_DEAD] = 10 * number
    assert keydir.words[at.TABLE] >> 32 == 8
    assert keydir.words[at.EPOCH] > 1
    assert {number: keydir.words[row + at.ROW_DEAD] for number, row in keydir.rows().items()} == {n: 10 * n for n in range(1, 301)}
    require_sound(keydir, model)
    other = reopened(keydir.file)
    other.listed = keydir.listed
    assert other.rows() == keydir.rows()


def test_many_rows_are_made_at_once_and_none_twice(keydir):
    keydir.listed = set(range(1, 301))
    add_row(keydir, 7)
    keydir.add_rows(range(1, 301))
    rows, epoch = keydir.rows(), keydir.words[at.EPOCH]
    assert sorted(rows) == list(range(1, 301))
    assert len(set(rows.values())) == 300
    keydir.add_rows(range(1, 301))
    assert (keydir.rows(), keydir.words[at.EPOCH]) == (rows, epoch)


# A kill at any moment


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    machine.install(monkeypatch)
    return machine


def split_states():
    """(name, hashes, the hash whose insertion splits a page)"""
    yield "split", [hashed for top in range(8) for hashed in hashes_below(top, 3, FULL, seed=top)], hashes_below(3, 3, 1, seed=50)[0]
    yield "split of the first page", hashes_below(0, 1, FULL // 2) + hashes_below(1, 1, FULL - FULL // 2), 12345
    yield "several splits and a doubled directory", hashes_below(6, 10, FULL), hashes_below(6, 10, 1, seed=60)[0]


@pytest.mark.parametrize(("hashes", "last"), [state[1:] for state in split_states()], ids=[state[0] for state in split_states()])
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "interrupted"])
def test_split_that_died_anywhere_is_finished(tmp_path, machine, hashes, last, killed):
    file = Directory(str(tmp_path)).create("keydir", 0o600)
    keydir = fresh(file)
    model = fill(keydir, hashes)
    good = (tmp_path / "keydir").read_bytes()
    machine.run(lambda: keydir.room(last))
    steps = machine.steps
    dies_at = range(1, steps + 1)
    if steps > 400:
        dies_at = sorted({*range(1, 60), *range(steps - 60, steps + 1), *range(60, steps, 23)})
    for number in dies_at:
        path = tmp_path / str(number)
        path.write_bytes(good)
        dying = reopened(Directory(str(tmp_path)).open(path.name, write=True))
        assert machine.run(lambda dying=dying: dying.room(last), number, killed=killed)
        require_readable(dying.file, model)
        after = reopened(dying.file) if killed else dying
        if after.words[at.STATE] == at.CHANGING:
            after.finish_split()
        assert after.words[at.STATE] == at.DIRTY
        put(after, last, location(2))
        # Dying in the moment in which the directory doubles leaves one behind that never becomes the root; a page is never lost.
        depth = after.words[at.ROOT] >> 32
        require_sound(after, {**model, last: location(2)}, garbage=1 + (1 << depth - 9) if depth > 9 else 0)
        path.unlink()


def require_readable(file, model):
    """A reader that comes now, without the lock, finds every slot."""
    reader = Keydir(file, memoryview(file.map(file.size())).cast("Q"), write=False)
    for hashed in list(model)[:: max(1, len(model) // 100)]:
        assert [reader.words[slot] for slot in probe(reader.table, hashed).found] == [model[hashed]]


def test_split_that_dies_while_it_is_finished_is_finished(tmp_path, machine):
    file = Directory(str(tmp_path)).create("keydir", 0o600)
    keydir = fresh(file)
    model = fill(keydir, hashes_below(9, 6, FULL + 1))
    extra = iter(hashes_below(9, 6, FULL, seed=99))
    last = next(extra)
    while keydir.words[probe(keydir.table, last).page * PAGE_WORDS + PAGE_COUNTS] & 0xFFFF < FULL:
        put(keydir, last, location(3))
        model[last] = location(3)
        last = next(extra)
    good = (tmp_path / "keydir").read_bytes()
    machine.run(lambda: keydir.room(last))
    steps = machine.steps
    for first in range(1, steps + 1):
        for second in itertools.count(1):
            path = tmp_path / f"{first} {second}"
            path.write_bytes(good)
            dying = reopened(Directory(str(tmp_path)).open(path.name, write=True))
            assert machine.run(lambda dying=dying: dying.room(last), first, killed=True)
            if dying.words[at.STATE] != at.CHANGING:
                break
            finisher = reopened(dying.file)
            died = machine.run(finisher.finish_split, second, killed=True)
            after = reopened(dying.file)
            after.finish_split()
            put(after, last, location(2))
            require_sound(after, {**model, last: location(2)})
            path.unlink()
            if not died:
                break


def test_noted_split_that_never_began_is_not_done_later(tmp_path, machine):
    """Killed between noting a split and entering CHANGING: what was noted is of then, and must not be done at some later change."""
    hashes = [hashed for top in range(8) for hashed in hashes_below(top, 3, FULL, seed=top)]
    last = hashes_below(3, 3, 1, seed=50)[0]
    file = Directory(str(tmp_path)).create("keydir", 0o600)
    model = fill(fresh(file), hashes)
    good = (tmp_path / "keydir").read_bytes()
    keydir = reopened(file)
    machine.run(lambda: keydir.room(last))
    for number in range(1, machine.steps + 1):
        path = tmp_path / str(number)
        path.write_bytes(good)
        dying = reopened(Directory(str(tmp_path)).open(path.name, write=True))
        machine.run(lambda dying=dying: dying.room(last), number, killed=True)
        after = reopened(dying.file)
        if after.words[at.STATE] == at.DIRTY:
            gone = next(hashed for hashed in hashes if hashed >> 61 == 3)
            delete(after, gone)
            after.words[at.STATE] = at.CHANGING  # a rotation, say, that dies now
            after.finish_split()
            require_sound(after, {hashed: where for hashed, where in model.items() if hashed != gone})
        path.unlink()


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "interrupted"])
def test_growing_the_table_can_die_anywhere(tmp_path, machine, killed):
    file = Directory(str(tmp_path)).create("keydir", 0o600)
    keydir = fresh(file)
    keydir.listed = set(range(1, 65))
    for number in range(1, 65):
        keydir.words[add_row(keydir, number) + at.ROW_DEAD] = number
    good = (tmp_path / "keydir").read_bytes()
    keydir.listed = set(range(1, 66))
    machine.run(lambda: keydir.add_rows([65]))
    for number in range(1, machine.steps + 1):
        path = tmp_path / str(number)
        path.write_bytes(good)
        dying = reopened(Directory(str(tmp_path)).open(path.name, write=True))
        dying.listed = set(range(1, 66))
        assert machine.run(lambda dying=dying: dying.add_rows([65]), number, killed=killed)
        after = reopened(dying.file) if killed else dying
        after.listed = set(range(1, 66))
        if after.words[at.STATE] == at.CHANGING:
            after.finish_split()
        row = add_row(after, 65)
        assert after.words[row : row + ROW_WORDS].tolist() == [65] + [0] * (ROW_WORDS - 1)
        rows = after.rows()
        assert {each: after.words[rows[each] + at.ROW_DEAD] for each in range(1, 65)} == {each: each for each in range(1, 65)}
        path.unlink()


def test_machine_really_dies(machine):
    keydir = fresh()
    slot = probe(keydir.table, 1).free
    assert machine.run(lambda: keydir.store(slot, 1, 1), 1)
    assert keydir.words[slot] == 0
    assert not machine.run(lambda: keydir.store(slot, 1, 1))
    steps = machine.steps
    assert keydir.words[slot] == 1
    assert not machine.run(lambda: keydir.store(slot, 1, 2), steps + 1, killed=True)
    assert keydir.words[slot] == 2
    assert machine.run(lambda: keydir.store(slot, 1, 3), machine.steps, killed=True)
    assert keydir.words[slot] == 2
