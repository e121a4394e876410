import builtins
import functools
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnopt import data
from nnopt.data import cifar, download
from nnopt.data.digits import bilinear_weights
from nnopt.errors import DataError


def error_line(call):
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# --- digits ---


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_are_split_into_strata(digits):
    assert digits.train_images.shape == (1437, 32, 32, 3)
    assert digits.test_images.shape == (360, 32, 32, 3)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_labels.dtype == np.int32
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    np.testing.assert_allclose(test / (train + test), 0.2, atol=0.006)
    assert "1,437" in digits.split_note
    assert not digits.flip_ok


def test_digits_split_is_fixed(digits):
    again = data.digits()
    np.testing.assert_array_equal(digits.train_images, again.train_images)
    np.testing.assert_array_equal(digits.test_labels, again.test_labels)
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 255


def test_bilinear_weights_agree_with_jax():
    image = np.random.default_rng(0).uniform(size=(8, 8)).astype(np.float32)
    weights = bilinear_weights(8, 32)
    expected = jax.image.resize(jnp.asarray(image), (32, 32), "bilinear")
    np.testing.assert_allclose(weights @ image @ weights.T, expected, atol=1e-5)


def test_normalize_gives_zero_mean_and_unit_deviation(digits):
    images = np.asarray(digits.normalize(digits.train_images))
    assert images.dtype == np.float32
    np.testing.assert_allclose(images.mean((0, 1, 2), dtype=np.float64), 0, atol=1e-4)
    np.testing.assert_allclose(images.std((0, 1, 2), dtype=np.float64), 1, atol=1e-4)


def test_minibatch_is_a_draw_without_replacement(digits):
    few = digits.subset(50, 10)
    images, labels = data.minibatch(few, 50, jax.random.key(3))
    assert images.dtype == jnp.float32
    assert sorted(labels.tolist()) == sorted(few.train_labels.tolist())
    flat = np.asarray(images).reshape(50, -1)
    assert len(np.unique(flat, axis=0)) == len(np.unique(few.train_images.reshape(50, -1), axis=0))
    again, _ = data.minibatch(few, 50, jax.random.key(3))
    other, _ = data.minibatch(few, 50, jax.random.key(4))
    np.testing.assert_array_equal(images, again)
    assert not np.array_equal(images, other)


def test_subset_tells_of_itself(digits):
    few = digits.subset(64)
    assert len(few.train_images) == 64
    assert len(few.test_images) == 360
    assert "64 training" in few.split_note
    assert "1 to 1,437" in error_line(lambda: digits.subset(5000))
    assert "1 to 1,437" in error_line(lambda: data.minibatch(digits, 2000, jax.random.key(0)))


def test_dataset_refuses_labels_out_of_range(digits):
    assert "0 to 4" in error_line(
        lambda: type(digits)(**{**vars(digits), "classes": tuple("abcde")})
    )


# --- augmentation ---

shapes = st.tuples(st.integers(1, 4), st.integers(3, 9), st.integers(3, 9), st.integers(1, 3))
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=10, deadline=None, derandomize=True)


def numbered(shape):
    """Every element another value, none of them 0."""
    return jnp.arange(1, np.prod(shape) + 1, dtype=jnp.float32).reshape(shape)


@quick
@given(shapes, seeds, st.integers(0, 2), st.sampled_from(["reflect", "constant"]))
def test_crop_is_a_window_of_the_padded_image(shape, seed, pad, mode):
    images = numbered(shape)
    cropped = np.asarray(data.pad_crop(jax.random.key(seed), images, pad, mode))
    assert cropped.shape == shape
    padded = np.pad(np.asarray(images), ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode=mode)
    windows = np.lib.stride_tricks.sliding_window_view(padded, shape[1:3], axis=(1, 2))
    for i in range(shape[0]):  # windows: [batch, y, x, channel, height, width]
        same = (np.moveaxis(windows[i], 2, -1) == cropped[i]).all((2, 3, 4))
        assert same.any()


def test_every_crop_offset_occurs():
    images = jnp.tile(numbered((1, 3, 3, 1)), (400, 1, 1, 1))
    cropped = data.pad_crop(jax.random.key(0), images, 1, "reflect")
    assert len(np.unique(np.asarray(cropped).reshape(400, -1), axis=0)) == 9


def test_constant_padding_takes_a_fill():
    images, fill = jnp.ones((64, 4, 4, 3)), jnp.asarray([-1.0, -2.0, -3.0])
    cropped = data.pad_crop(jax.random.key(0), images, 2, "constant", fill)
    pixels = np.unique(np.asarray(cropped).reshape(-1, 3), axis=0)
    np.testing.assert_array_equal(pixels, [[-1, -2, -3], [1, 1, 1]])


def test_too_much_reflection_is_refused():
    images = jnp.zeros((1, 4, 4, 3))
    assert "below 4" in error_line(lambda: data.pad_crop(jax.random.key(0), images, 4))


@quick
@given(shapes, seeds)
def test_flip_is_an_involution(shape, seed):
    images, key = numbered(shape), jax.random.key(seed)
    flipped = data.random_flip(key, images)
    np.testing.assert_array_equal(data.random_flip(key, flipped), images)
    for image, result in zip(np.asarray(images), np.asarray(flipped), strict=True):
        assert np.array_equal(result, image) or np.array_equal(result, image[:, ::-1])


def test_about_half_is_flipped():
    images = numbered((1000, 1, 2, 1))
    flipped = np.asarray(data.random_flip(jax.random.key(0), images) != images)[:, 0, 0, 0]
    assert 400 < flipped.sum() < 600


@quick
@given(shapes, seeds, st.integers(1, 9))
def test_cutout_zeroes_exactly_one_clipped_square(shape, seed, size):
    batch, height, width, _ = shape
    images = numbered(shape)
    cut = np.asarray(data.cutout(jax.random.key(seed), images, size))
    zero = cut == 0
    np.testing.assert_array_equal(cut[~zero], np.asarray(images)[~zero])
    assert (zero == zero[..., :1]).all()
    squares = set()
    for y in range(height):
        for x in range(width):
            mask = np.zeros((height, width), bool)
            top, left = y - size // 2, x - size // 2
            mask[max(top, 0) : top + size, max(left, 0) : left + size] = True
            squares.add(mask.tobytes())
    assert all(zero[i, :, :, 0].tobytes() in squares for i in range(batch))


def test_augmentation_keeps_shape_and_compiles_once():
    augmentation = data.Augmentation(pad=2, pad_mode="constant", cutout=3)
    traces = []

    @jax.jit
    def augment(key, images):
        traces.append(None)
        return augmentation(key, images)

    images = numbered((8, 9, 9, 3))
    first = augment(jax.random.key(0), images)
    second = augment(jax.random.key(1), images)
    assert first.shape == images.shape
    assert first.dtype == images.dtype
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, augment(jax.random.key(0), images))
    assert len(traces) == 1


def test_no_augmentation_is_the_identity():
    images = numbered((2, 4, 4, 3))
    np.testing.assert_array_equal(data.NO_AUGMENTATION(jax.random.key(0), images), images)


def test_augmentation_refuses_nonsense():
    assert "pad_mode" in error_line(lambda: data.Augmentation(pad_mode="mirror"))
    assert "0 or more" in error_line(lambda: data.Augmentation(cutout=-1))


# --- CIFAR files ---

CIFAR10_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def images_of(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3072), np.uint8)


def batch_of(n, seed=0, label_key=b"labels", classes=10):
    labels = np.random.default_rng(seed).integers(0, classes, n).tolist()
    return {b"data": images_of(n, seed), label_key: labels, b"batch_label": b"x"}


def write(path, content, protocol=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """Folders of both kinds in the original format, with 20 images a file."""
    monkeypatch.setattr(cifar, "BATCH_IMAGES", 20)
    monkeypatch.setattr(cifar, "CIFAR100_TRAIN_IMAGES", 100)
    monkeypatch.setattr(cifar, "VALIDATION_IMAGES", 20)
    monkeypatch.setattr(cifar, "TEST_IMAGES", 20)
    for i, name in enumerate(CIFAR10_FILES):
        write(tmp_path / "cifar-10-batches-py" / name, batch_of(20, i))
    for name, n in (("train", 100), ("test", 20)):
        write(tmp_path / "cifar-100-python" / name, batch_of(n, n, b"fine_labels", 100))
    return tmp_path


def test_pixels_are_unfolded_as_planes(small_cifar):
    dataset = data.cifar10(small_cifar)
    raw = images_of(20, 0)
    assert dataset.train_images.shape == (100, 32, 32, 3)
    # The file holds 1,024 red, then 1,024 green, then 1,024 blue bytes, row by row.
    assert dataset.train_images[7, 2, 5].tolist() == [
        raw[7, c * 1024 + 2 * 32 + 5] for c in range(3)
    ]
    assert dataset.split_note == "the 20 official test images"


def test_the_folder_or_its_parent(small_cifar):
    inner = data.load("CIFAR-10", small_cifar / "cifar-10-batches-py")
    outer = data.load("cifar10", str(small_cifar))
    np.testing.assert_array_equal(inner.test_images, outer.test_images)


def test_cifar100(small_cifar):
    dataset = data.load("cifar-100", small_cifar)
    assert len(dataset.classes) == len(set(dataset.classes)) == 100
    assert list(dataset.classes) == sorted(dataset.classes)
    held_out = data.load("cifar100", small_cifar, validation=True)
    assert len(held_out.train_images) == 80
    np.testing.assert_array_equal(held_out.test_images, dataset.train_images[80:])
    pixels = held_out.train_images / 255.0
    np.testing.assert_allclose(held_out.mean, pixels.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(held_out.std, pixels.std((0, 1, 2)), rtol=1e-9)


def test_validation_needs_no_test_file(small_cifar):
    (small_cifar / "cifar-10-batches-py" / "test_batch").unlink()
    dataset = data.cifar10(small_cifar, validation=True)
    assert len(dataset.train_images) == 80
    assert "data_batch_5" in dataset.split_note
    assert "test_batch is missing" in error_line(lambda: data.cifar10(small_cifar))


def test_a_short_test_file_is_told(small_cifar):
    write(small_cifar / "cifar-10-batches-py" / "test_batch", batch_of(11))
    assert "only 11 of the 20 official" in data.cifar10(small_cifar).split_note


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (batch_of(19), "19 images instead of 20"),
        ({**batch_of(20), b"data": images_of(20)[:, :100]}, "3,072"),
        ({**batch_of(20), b"data": images_of(20).ravel()}, "uint8 matrix"),
        ({**batch_of(20), b"data": [1, 2]}, "uint8 matrix"),
        ({**batch_of(20), b"labels": [10] * 20}, "0 to 9"),
        ({**batch_of(20), b"labels": [1.5] * 20}, "0 to 9"),
        ({**batch_of(20), b"labels": [1] * 19}, "20 labels"),
        ({b"data": images_of(20)}, "no entry 'labels'"),
        ([1, 2, 3], "a list instead of a dict"),
        ({**batch_of(20), b"data": images_of(20).astype(np.float32)}, "instead of 'u1'"),
    ],
)
def test_wrong_content_is_named(small_cifar, content, said):
    path = small_cifar / "cifar-10-batches-py" / "data_batch_3"
    write(path, content)
    message = error_line(lambda: data.cifar10(small_cifar))
    assert said in message
    assert str(path) in message


@pytest.mark.parametrize("kept", [0, 1, 10, 1000, -1])
def test_truncated_files(small_cifar, kept):
    path = small_cifar / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} is damaged" in error_line(lambda: data.cifar10(small_cifar))


@pytest.mark.parametrize("content", [b"<html>Not found</html>", b"\x1f\x8b\x08 gzip", b"I1\n."])
def test_other_files(small_cifar, content):
    path = small_cifar / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(content)
    assert str(path) in error_line(lambda: data.cifar10(small_cifar))


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "payload",
    [
        lambda flag: Call(os.system, f"touch {flag}"),
        lambda flag: Call(builtins.eval, f"open({str(flag)!r}, 'w')"),
        lambda flag: Call(np.save, str(flag), 1),
        lambda flag: Call(np.ndarray, (10**14,)),
        lambda flag: np.array([Call(os.system, f"touch {flag}")], object),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_code_in_a_pickle_never_runs(small_cifar, payload, protocol):
    flag = small_cifar / "flag"
    path = small_cifar / "cifar-10-batches-py" / "data_batch_1"
    write(path, {**batch_of(20), b"extra": payload(flag)}, protocol)
    assert str(path) in error_line(lambda: data.cifar10(small_cifar))
    assert not flag.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cnumpy\ndtype.type.__call__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I99999999999999\ntS'b'\ntR.",
        b"c_codecs\nencode\n(Vx\nVevil_module\ntR.",
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.",
    ],
)
def test_hand_written_pickles_are_refused(small_cifar, opcodes):
    path = small_cifar / "cifar-10-batches-py" / "data_batch_1"
    path.write_bytes(opcodes)
    assert f"{path} is damaged" in error_line(lambda: data.cifar10(small_cifar))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_old_and_new_names_are_read(small_cifar, module):
    path = small_cifar / "cifar-10-batches-py" / "data_batch_1"
    written = path.read_bytes()
    assert b"numpy._core.multiarray" in written
    path.write_bytes(written.replace(b"numpy._core.multiarray", module))
    raw = images_of(20, 0).reshape(20, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(data.cifar10(small_cifar).train_images[:20], raw)


def test_python_2_pickles_are_read(small_cifar):
    # As Python 2 wrote them: byte strings in place of text, and 0 and 1 in place of False and True.
    raw = images_of(20, 5)
    body = raw.tobytes()
    written = b"".join(
        [
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
            b"(K\x01K\x14M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff",
            b"J\xff\xff\xff\xffK\x00tb\x89T" + len(body).to_bytes(4, "little") + body + b"tb",
            b"U\x06labels](" + b"K\x07" * 20 + b"eu.",
        ]
    )
    (small_cifar / "cifar-10-batches-py" / "data_batch_1").write_bytes(written)
    dataset = data.cifar10(small_cifar)
    assert dataset.train_labels[:20].tolist() == [7] * 20
    np.testing.assert_array_equal(
        dataset.train_images[:20], raw.reshape(20, 3, 32, 32).transpose(0, 2, 3, 1)
    )


def test_missing_folders(tmp_path, monkeypatch):
    assert "is not a folder" in error_line(lambda: data.cifar10(tmp_path / "none"))
    assert "cifar-10-batches-py" in error_line(lambda: data.cifar10(tmp_path))
    assert "cifar-100-python" in error_line(lambda: data.cifar100(tmp_path))
    assert "digits, cifar10, cifar100" in error_line(lambda: data.load("mnist"))
    monkeypatch.delenv("NNOPT_DATA", raising=False)
    message = error_line(lambda: data.load("cifar10"))
    assert "--data-dir" in message
    assert "NNOPT_DATA" in message
    assert "download_cifar" in message


def test_the_environment_names_the_folder(small_cifar, monkeypatch):
    monkeypatch.setenv("NNOPT_DATA", str(small_cifar))
    assert data.load("cifar10").name == "cifar10"


def test_real_cifar10(data_dir):
    """The pixel statistics and class counts of the original."""
    dataset = data.cifar10(data_dir, validation=True)
    assert dataset.train_images.shape == (40_000, 32, 32, 3)
    assert dataset.test_images.shape == (10_000, 32, 32, 3)
    assert "40,000" in dataset.split_note
    counts = np.bincount(dataset.train_labels) + np.bincount(dataset.test_labels)
    assert counts.tolist() == [5000] * 10
    whole = np.concatenate([dataset.train_images, dataset.test_images])
    mean, std = cifar.channel_statistics(whole)
    np.testing.assert_allclose((mean, std), cifar.CIFAR10_STATISTICS, atol=6e-5)


def test_real_cifar10_test_split(data_dir):
    dataset = data.load("cifar10", data_dir)
    assert len(dataset.train_images) == 50_000
    if len(dataset.test_images) < 10_000:
        assert f"only {len(dataset.test_images):,} of the 10,000" in dataset.split_note


# --- download ---


def archive_of(members, folder="cifar-10-batches-py"):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


GOOD = {name: name.encode() for name in ("batches.meta", *CIFAR10_FILES)}


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """Publish an archive below a file URL, with its checksum unless another one is given."""

    def publish(packed, md5=None):
        folder = tmp_path / "mirror"
        folder.mkdir()
        (folder / "cifar-10-python.tar.gz").write_bytes(packed)
        md5 = md5 or hashlib.md5(packed).hexdigest()
        old = download.ARCHIVES["cifar10"]
        changed = type(old)(old.file, md5, old.folder, old.members)
        monkeypatch.setitem(download.ARCHIVES, "cifar10", changed)
        return folder.as_uri()

    return publish


def fetch(folder, url, **kwargs):
    return data.download_cifar("cifar-10", folder, base_url=url, show_progress=False, **kwargs)


def test_download_unpacks_what_is_expected(tmp_path, mirror):
    url = mirror(archive_of({**GOOD, "readme.html": b"", "../../escape": b"x"}))
    path = fetch(tmp_path / "new" / "folder", url)
    assert sorted(p.name for p in path.iterdir()) == sorted(GOOD)
    assert (path / "test_batch").read_bytes() == b"test_batch"
    assert [p.name for p in path.parent.iterdir()] == ["cifar-10-batches-py"]
    assert not list(tmp_path.rglob("escape"))
    assert fetch(path.parent, "file:///nowhere") == path  # it is there: nothing is fetched


def test_download_over_http_shows_progress(tmp_path, mirror, capsys):
    mirror(archive_of(GOOD))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "mirror"))
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        path = data.download_cifar("cifar10", tmp_path / "out", base_url=url)
        message = error_line(lambda: fetch(tmp_path / "other", url + "/absent"))
        server.shutdown()
        thread.join()
    assert (path / "data_batch_5").is_file()
    assert "cifar-10-python.tar.gz" in capsys.readouterr().err
    assert "404" in message


@pytest.mark.parametrize(
    ("packed", "md5", "said"),
    [
        (archive_of(GOOD), "0" * 32, "instead of " + "0" * 32),
        (b"not an archive", None, "cannot be unpacked"),
        (archive_of(GOOD)[:-40], None, "cannot be unpacked"),
        (archive_of({"test_batch": b""}), None, "cannot be unpacked"),
    ],
)
def test_bad_archives_leave_nothing(tmp_path, mirror, packed, md5, said):
    url = mirror(packed, md5)
    assert said in error_line(lambda: fetch(tmp_path / "out", url))
    assert not list((tmp_path / "out").iterdir())


def test_a_link_in_the_archive_is_refused(tmp_path, mirror):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name in GOOD:
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(member)
    url = mirror(packed.getvalue())
    assert "not a plain file" in error_line(lambda: fetch(tmp_path / "out", url))


def test_no_network_says_where_the_files_go(tmp_path):
    message = error_line(lambda: fetch(tmp_path, "http://127.0.0.1:9"))
    assert "by hand" in message
    assert str(tmp_path / "cifar-10-batches-py") in message


def test_download_refuses_unknown_names_and_half_folders(tmp_path):
    message = error_line(lambda: data.download_cifar("mnist", tmp_path))
    assert "cifar10, cifar100" in message
    write(tmp_path / "cifar-10-batches-py" / "test_batch", {})
    assert "remove it" in error_line(lambda: fetch(tmp_path, "file:///nowhere"))
    (tmp_path / "file").write_text("")
    assert "another folder" in error_line(lambda: fetch(tmp_path / "file", "file:///nowhere"))
