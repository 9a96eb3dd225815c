"""Files of point clouds: everything comes back, and what cannot be read is named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_modules.point_clouds.files import CloudFile, find_clouds, read_cloud, write_ply

plyfile = pytest.importorskip("plyfile")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A PLY file with colors, an intensity, faces, an element of its own and comments."""
    generator = np.random.default_rng(0)
    vertices = np.empty(
        30, [("x", "f4"), ("y", "f4"), ("z", "f4"), ("red", "u1"), ("intensity", "f8"), ("label", "i2")]
    )
    for name in vertices.dtype.names or ():
        vertices[name] = 100 * generator.random(30)
    vertices["y"][4] = np.nan
    faces = np.empty(2, [("vertex_indices", "O"), ("quality", "f4")])
    faces["vertex_indices"] = [np.array([0, 1, 2, 3], "i4"), np.array([5, 6, 7], "i4")]
    faces["quality"] = [1, 2]
    camera = np.array([(1.5, 7)], [("focal", "f8"), ("number", "i4")])
    elements = [
        plyfile.PlyElement.describe(vertices, "vertex"),
        plyfile.PlyElement.describe(faces, "face", val_types={"vertex_indices": "i4"}),
        plyfile.PlyElement.describe(camera, "camera"),
    ]
    path = tmp_path / "scan.ply"
    plyfile.PlyData(elements, text=True, comments=["from a scanner"]).write(path)
    return path


def test_everything_but_the_coordinates_is_kept(scan: Path, tmp_path: Path) -> None:
    file = read_cloud(scan)
    assert file.finite.sum() == 29
    assert file.faces is not None
    assert file.faces.tolist() == [[0, 1, 2], [0, 2, 3], [5, 6, 7]]
    write_ply(file.moved(file.points + 1), tmp_path / "out" / "moved.ply")
    before, after = plyfile.PlyData.read(scan), plyfile.PlyData.read(tmp_path / "out" / "moved.ply")
    assert [element.name for element in after] == ["vertex", "face", "camera"]
    assert after.comments == ["from a scanner"]
    assert before["vertex"].data.dtype == after["vertex"].data.dtype
    for name in ("red", "intensity", "label"):
        np.testing.assert_array_equal(before["vertex"][name], after["vertex"][name])
    for axis in "xyz":
        np.testing.assert_array_equal(before["vertex"][axis] + np.float32(1), after["vertex"][axis])
    for name in ("face", "camera"):
        for one, other in zip(before[name].data, after[name].data, strict=True):
            for left, right in zip(one, other, strict=True):
                np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("suffix", [".npy", ".xyz"])
def test_tables_keep_their_columns(suffix: str, tmp_path: Path) -> None:
    table = np.random.default_rng(0).normal(size=(20, 5)) + 5e6
    path = tmp_path / f"cloud{suffix}"
    np.save(path, table) if suffix == ".npy" else np.savetxt(path, table, fmt="%.18g")
    file = read_cloud(path)
    np.testing.assert_array_equal(file.points, table[:, :3])
    write_ply(file, tmp_path / "out.ply")
    found = plyfile.PlyData.read(tmp_path / "out.ply")["vertex"]
    np.testing.assert_array_equal(found["scalar_4"], table[:, 4])
    assert found["x"].dtype == np.float64


def test_pcd_keeps_its_fields(tmp_path: Path) -> None:
    pypcd4 = pytest.importorskip("pypcd4")
    points = np.random.default_rng(0).random((20, 3)).astype("f4")
    cloud = pypcd4.PointCloud.from_xyzi_points(np.column_stack([points, np.arange(20)]).astype("f4"))
    cloud.save(tmp_path / "cloud.pcd")
    file = read_cloud(tmp_path / "cloud.pcd")
    np.testing.assert_array_equal(file.points, points)
    write_ply(file, tmp_path / "out.ply")
    np.testing.assert_array_equal(plyfile.PlyData.read(tmp_path / "out.ply")["vertex"]["intensity"], np.arange(20))


def test_triangles_of_obj_are_read(tmp_path: Path) -> None:
    pytest.importorskip("trimesh")
    (tmp_path / "mesh.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\n")
    file = read_cloud(tmp_path / "mesh.obj")
    assert file.faces is not None
    assert (len(file.points), len(file.faces)) == (4, 2)
    write_ply(file, tmp_path / "out.ply")
    again = read_cloud(tmp_path / "out.ply")
    assert again.faces is not None
    np.testing.assert_array_equal(again.faces, file.faces)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.ply", b"", "empty.ply is empty"),
        ("empty.pcd", b"", "empty.pcd is empty"),
        (
            "faces.ply",
            b"ply\nformat ascii 1.0\nelement face 1\nproperty list uchar int vertex_indices\nend_header\n3 0 1 2\n",
            "faces.ply holds no points",
        ),
        ("none.ply", b"ply\nformat ascii 1.0\nelement vertex 0\nproperty float x\nend_header\n", "holds no y and no z"),
        (
            "zero.ply",
            b"ply\nformat ascii 1.0\nelement vertex 0\nproperty float x\nproperty float y\nproperty float z\n"
            b"end_header\n",
            "holds no points",
        ),
        ("cut.ply", b"ply\nformat ascii 1.0\nelement vertex 9\nproperty float x\nend_header\n1\n", "cut.ply cannot be"),
        ("flat.xyz", b"1 2\n3 4\n", r"flat.xyz cannot be read: points must be .* \[2, 2\]: append a column of zeros"),
        ("words.xyz", b"a b c\n", "words.xyz cannot be read"),
        ("noise.npy", b"\x93NUMPY nonsense", "noise.npy cannot be read"),
        ("empty.xyz", b"", "empty.xyz is empty"),
        ("comment.xyz", b"# x y z\n", "comment.xyz cannot be read: it is empty"),
        ("cloud.las", b"", "cloud.las is not one of .ply"),
    ],
)
def test_what_is_no_cloud_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_cloud(tmp_path / name)


def test_points_without_faces_are_read_from_obj(tmp_path: Path) -> None:
    pytest.importorskip("trimesh")
    (tmp_path / "scan.obj").write_text("v 0 0 0\nv 1 0 2\n")
    file = read_cloud(tmp_path / "scan.obj")
    assert file.faces is None
    assert file.points.tolist() == [[0, 0, 0], [1, 0, 2]]
    (tmp_path / "faces.obj").write_text("f 1 2 3\n")
    with pytest.raises(ValueError, match=r"faces.obj holds no points"):
        read_cloud(tmp_path / "faces.obj")


def test_a_mesh_loses_its_holes_and_what_has_no_area() -> None:
    points = np.array([[0, 0, 0], [np.nan, 0, 0], [1, 0, 0], [0, 1, 0], [2, 0, 0]])
    whole, broken, line = [0, 2, 3], [0, 1, 2], [0, 2, 4]
    file = replace(CloudFile.of(points), faces=np.array([broken, whole, line]))
    kept, faces = file.finite_mesh()
    np.testing.assert_array_equal(kept, points[[0, 2, 3, 4]])
    assert faces is not None
    assert faces.tolist() == [[0, 1, 2]]
    assert replace(file, faces=np.array([line, broken])).finite_mesh()[1] is None
    with pytest.raises(ValueError, match="a face has the corner 5, and there are 5 points"):
        replace(file, faces=np.array([[0, 2, 5]])).finite_mesh()


@pytest.mark.parametrize("kind", ["bool", "complex128"])
def test_tables_of_no_real_numbers_are_named(kind: str, tmp_path: Path) -> None:
    np.save(tmp_path / "odd.npy", np.ones((20, 3), kind))
    with pytest.raises(ValueError, match=f"odd.npy cannot be read: points must be real numbers, got {kind}"):
        read_cloud(tmp_path / "odd.npy")


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    np.save(tmp_path / "bad.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read"):
        read_cloud(tmp_path / "bad.npy")


def test_folders_are_searched_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.xyz", "a/c.PLY", ".hidden/d.xyz", ".e.xyz", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in find_clouds(tmp_path)] == ["a/c.PLY", "b.xyz"]
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no point clouds"):
        find_clouds(empty)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        find_clouds(tmp_path / "none")


def test_integer_tables_get_room_for_fractions() -> None:
    file = CloudFile.of(np.arange(12).reshape(4, 3))
    assert file.moved(file.points + 0.25).points[0, 0] == 0.25
