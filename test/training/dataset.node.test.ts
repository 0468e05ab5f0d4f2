import { createHash } from 'node:crypto';
import { chmod, mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import sharp from 'sharp';
import { afterEach, beforeAll, beforeEach, describe, expect, it, test } from 'vitest';
import { readDataset } from '../../src/training/dataset.node.ts';

let png: Buffer;
beforeAll(async () => {
  png = await sharp({ create: { width: 6, height: 4, channels: 3, background: 'red' } })
    .png()
    .toBuffer();
});

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'mmditx-'));
});
afterEach(() => rm(folder, { recursive: true, force: true }));

async function put(files: Record<string, string | Uint8Array>): Promise<void> {
  for (const [name, content] of Object.entries(files)) {
    await mkdir(dirname(join(folder, name)), { recursive: true });
    await writeFile(join(folder, name), content);
  }
}

const rows = (...values: unknown[]) => values.map((value) => JSON.stringify(value)).join('\n');

/** Captions by name. */
async function captionsOf(path = folder, options = {}): Promise<Record<string, readonly string[]>> {
  const { pictures } = await readDataset({ path, ...options });
  return Object.fromEntries(pictures.map(({ name, captions }) => [name, captions]));
}

describe('a folder of pictures', () => {
  it('gives each picture its size, digest and place', async () => {
    const turned = await sharp(png).withMetadata({ orientation: 6 }).jpeg().toBuffer();
    await put({ 'a.png': png, 'b/c.JPG': turned });
    const { pictures, broken } = await readDataset({ path: folder });
    const digest = (bytes: Uint8Array) => createHash('sha256').update(bytes).digest('hex');
    expect(pictures).toEqual([
      { path: join(folder, 'a.png'), name: 'a.png', width: 6, height: 4, digest: digest(png), captions: [''] },
      { path: join(folder, 'b/c.JPG'), name: 'b/c.JPG', width: 4, height: 6, digest: digest(turned), captions: [''] },
    ]);
    expect(broken).toEqual([]);
  });

  it('is ordered by code units, whatever the file system says', async () => {
    await put(Object.fromEntries(['b', 'a10', 'a2', 'B', 'a/z', 'é', 'Z'].map((name) => [`${name}.png`, png])));
    const names = (await readDataset({ path: folder })).pictures.map(({ name }) => name);
    expect(names).toEqual(['B.png', 'Z.png', 'a/z.png', 'a10.png', 'a2.png', 'b.png', 'é.png']);
  });

  it('has captions beside the pictures, one a line', async () => {
    await put({
      'a.png': png,
      'a.txt': '\ufeffa cat, red\r\n\r\n  two cats  \n',
      'b.png': png,
      'b.png.txt': 'b',
      'c.d.png': png,
      'c.d.txt': 'c',
      'e.png': png,
      'e.txt': ' \n',
    });
    expect(await captionsOf()).toEqual({
      'a.png': ['a cat, red', 'two cats'],
      'b.png': ['b'],
      'c.d.png': ['c'],
      'e.png': [''],
    });
  });

  it('has captions of another extension, with or without its dot', async () => {
    await put({ 'a.png': png, 'a.txt': 'no', 'a.caption': 'yes' });
    expect(await captionsOf(folder, { captionExtension: '.caption' })).toEqual({ 'a.png': ['yes'] });
    expect(await captionsOf(folder, { captionExtension: 'caption' })).toEqual({ 'a.png': ['yes'] });
    for (const captionExtension of ['', '.', '/../x']) {
      await expect(readDataset({ path: folder, captionExtension })).rejects.toMatchObject({ code: 'bad-option' });
    }
  });

  it('has captions in a metadata file, which come first', async () => {
    await put({
      'a.png': png,
      'a.txt': 'beside',
      'b.png': png,
      'b.txt': 'beside',
      'c.png': png,
      'd.png': png,
      'd.txt': 'beside',
      'e/f.png': png,
      'metadata.jsonl': rows(
        { file_name: 'a.png', text: 'one', other: 3 },
        { file_name: './a.png', text: 'two\nthree' },
        { file_name: 'c.png', caption: 'named otherwise' },
        { file_name: 'd.png' },
        { file_name: 'e/f.png', text: ['f', 'g'] },
        { file_name: 'gone.png', text: 'gone' },
      ),
    });
    expect(await captionsOf()).toEqual({
      'a.png': ['one', 'two', 'three'],
      'b.png': ['beside'],
      'c.png': ['named otherwise'],
      'd.png': ['beside'],
      'e/f.png': ['f', 'g'],
    });
    const { broken } = await readDataset({ path: folder });
    expect(broken).toEqual([{ name: 'gone.png', reason: 'is missing' }]);
  });

  it('leaves folders below and hidden files out', async () => {
    await put({ 'a.png': png, '.b.png': png, 'c/d.png': png, '.e/f.png': png, 'notes.md': 'x', 'g.npz': 'x' });
    expect(Object.keys(await captionsOf())).toEqual(['a.png', 'c/d.png']);
    expect(Object.keys(await captionsOf(folder, { recursive: false }))).toEqual(['a.png']);
  });

  it('follows links, but not in circles', async () => {
    await put({ 'a/b.png': png });
    await symlink(join(folder, 'a/b.png'), join(folder, 'link.png'));
    await symlink(folder, join(folder, 'a/up'));
    await symlink(join(folder, 'nowhere'), join(folder, 'a/dead.png'));
    const { pictures, broken } = await readDataset({ path: folder });
    expect(pictures.map(({ name }) => name)).toEqual(['a/b.png', 'link.png']);
    expect(broken).toEqual([{ name: 'a/dead.png', reason: 'is missing' }]);
  });

  it('lists what cannot be used, with the reason, and goes on', async () => {
    await put({
      'good.png': png,
      'text.jpg': 'not a picture',
      'empty.png': '',
      'gif.png': await sharp(png).gif().toBuffer(),
      'vector.png': '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>',
      'moving.gif': 'whatever',
      'phone.HEIC': 'whatever',
      'huge.png': bigger(png, 60_000, 60_000),
      'words.png': png,
      'words.txt': Buffer.from([0x61, 0xff, 0xfe]),
      'book.png': png,
      'book.txt': 'x'.repeat(100_000),
      'folder.png/inside.txt': 'x',
    });
    const { pictures, broken } = await readDataset({ path: folder });
    expect(pictures.map(({ name }) => name)).toEqual(['good.png']);
    expect(broken).toEqual([
      { name: 'book.png', reason: 'has a caption file that is larger than 0.0625 MiB' },
      { name: 'empty.png', reason: 'is empty' },
      { name: 'gif.png', reason: 'is a picture in the format gif, not JPEG, PNG, WebP or AVIF' },
      { name: 'huge.png', reason: 'is 60000 x 60000 pixels, more than 134217728' },
      { name: 'moving.gif', reason: 'is a .gif file, not JPEG, PNG, WebP or AVIF' },
      { name: 'phone.HEIC', reason: 'is a .HEIC file, not JPEG, PNG, WebP or AVIF' },
      { name: 'text.jpg', reason: 'is not a picture' },
      { name: 'vector.png', reason: 'is a picture in the format svg, not JPEG, PNG, WebP or AVIF' },
      { name: 'words.png', reason: 'has a caption file that is not a text in UTF-8' },
    ]);
  });

  test.skipIf(process.getuid?.() === 0)('lists files and folders that may not be read', async () => {
    await put({ 'a.png': png, 'b.png': png, 'c/d.png': png });
    await chmod(join(folder, 'b.png'), 0);
    await chmod(join(folder, 'c'), 0);
    const { broken } = await readDataset({ path: folder });
    await chmod(join(folder, 'c'), 0o700);
    expect(broken).toEqual([
      { name: 'b.png', reason: 'cannot be read (EACCES)' },
      { name: 'c/', reason: 'cannot be read (EACCES)' },
    ]);
  });

  it('reads hundreds of pictures quickly, tells how far it is, and stops when told', async () => {
    const names = Array.from({ length: 300 }, (_, i) => `${i}.png`);
    await put(
      Object.fromEntries(
        names.flatMap((name) => [
          [name, png],
          [`${name}.txt`, name],
        ]),
      ),
    );
    const progress: string[] = [];
    const start = performance.now();
    const { pictures } = await readDataset(
      { path: folder },
      { onProgress: ({ read, total }) => progress.push(`${read}/${total}`) },
    );
    expect(performance.now() - start).toBeLessThan(3000);
    expect(pictures).toHaveLength(300);
    expect(pictures.every(({ name, captions }) => captions[0] === name)).toBe(true);
    expect(progress).toEqual(names.map((_, i) => `${i + 1}/300`));

    const stop = new AbortController();
    const stopped = readDataset(
      { path: folder },
      { signal: stop.signal, onProgress: ({ read }) => read === 9 && stop.abort(new Error('enough')) },
    );
    await expect(stopped).rejects.toThrow('enough');
  });
});

describe('a file that lists pictures', () => {
  it('may be a .jsonl, which leaves out what it does not name', async () => {
    await put({
      'a.png': png,
      'b.png': png,
      'b.txt': 'beside',
      'lists/x.jsonl': '',
      'train.jsonl': `\n${rows({ file_name: 'b.png' }, { file_name: 'a.png', text: '' })}\n`,
    });
    expect(await captionsOf(join(folder, 'train.jsonl'))).toEqual({ 'a.png': [''], 'b.png': ['beside'] });
  });

  it('may be a text, a path on each line', async () => {
    await put({
      'a.png': png,
      'c/b.png': png,
      'c/b.txt': 'beside',
      'not.png': png,
      'list.txt': 'c/b.png\r\n\na.png\na.png',
    });
    expect(await captionsOf(join(folder, 'list.txt'))).toEqual({ 'a.png': [''], 'c/b.png': ['beside'] });
  });

  it('cannot reach outside its folder', async () => {
    await put({ 'outside.png': png, 'data/a.png': png });
    const paths = ['../outside.png', join(folder, 'outside.png'), 'b/../../outside.png', '..', '.', 'a.png/../a.png'];
    await put({
      'data/metadata.jsonl': rows(...paths.map((path) => ({ file_name: path, text: 'x' }))),
      'data/list.txt': paths.join('\n'),
    });
    for (const path of ['data', 'data/metadata.jsonl', 'data/list.txt']) {
      const { pictures, broken } = await readDataset({ path: join(folder, path) });
      expect(pictures.map(({ name }) => name)).toEqual(['a.png']);
      expect(broken).toHaveLength(5);
      for (const { reason } of broken) expect(reason).toContain('does not lie in the folder');
      expect(broken[0]!.reason).toContain('"../outside.png"');
    }
  });

  it('notes wrong lines by their number', async () => {
    await put({
      'a.png': png,
      'm.jsonl': [
        '{"file_name": "a.png"}',
        '',
        '{"file_name": ',
        '{"text": "a"}',
        '{"file_name": "a.png", "text": 3}',
        '{"file_name": "a.png", "text": ["a", 3]}',
        '"a.png"',
        'null',
        JSON.stringify({ file_name: 'a.png', text: 'x'.repeat(70_000) }),
        JSON.stringify({ file_name: 'a\0.png' }),
      ].join('\n'),
    });
    const { pictures, broken } = await readDataset({ path: join(folder, 'm.jsonl') });
    expect(pictures).toHaveLength(1);
    expect(broken).toEqual([
      { name: 'a\0.png', reason: 'cannot be read (ERR_INVALID_ARG_VALUE)' },
      ...[3, 4, 5, 6, 7, 8].map((line) => ({
        name: `m.jsonl, line ${line}`,
        reason: 'is not JSON with a file_name and a text',
      })),
      { name: 'm.jsonl, line 9', reason: 'is longer than 65536 characters' },
    ]);
  });

  it('is refused where nearly all of it is wrong', async () => {
    await put({ 'a.png': png, 'm.jsonl': `{"file_name": "a.png"}\n${'x\n'.repeat(5000)}` });
    await expect(readDataset({ path: join(folder, 'm.jsonl') })).rejects.toMatchObject({
      code: 'bad-file',
      message: expect.stringContaining('more than 1000 wrong lines'),
    });
  });
});

describe('a path that is no data set', () => {
  const fails = (path: string, code: string, words: string) =>
    expect(readDataset({ path })).rejects.toMatchObject({
      name: 'MmditxError',
      code,
      message: expect.stringContaining(words),
    });

  it('is refused in a sentence', async () => {
    await put({ 'empty/notes.md': 'x', 'bad/a.jpg': 'x', 'bad/b.jpg': 'x', 'a.png': png, 'data.bin': png });
    await fails(join(folder, 'none'), 'io', 'no such file or folder');
    await fails(join(folder, 'empty'), 'bad-file', 'has no pictures; give a folder of');
    await fails(join(folder, 'bad'), 'bad-file', '"a.jpg" is not a picture, and 1 more cannot be used');
    await fails(join(folder, 'a.png'), 'bad-file', 'is one picture; give the folder');
    await fails(join(folder, 'data.bin'), 'bad-file', 'is not a text in UTF-8; give a folder');
    await fails(join(folder, 'empty/notes.md'), 'bad-file', '"x" is missing');
  });
});

/** A PNG whose header claims another size. */
function bigger(bytes: Buffer, width: number, height: number): Buffer {
  const copy = Buffer.from(bytes);
  copy.writeUInt32BE(width, 16);
  copy.writeUInt32BE(height, 20);
  copy.writeUInt32BE(crc32(copy.subarray(12, 29)), 29);
  return copy;
}

function crc32(bytes: Uint8Array): number {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  }
  return ~crc >>> 0;
}
