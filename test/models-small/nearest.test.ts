import { describe, expect, it } from 'vitest';
import { BACKGROUNDS, type Background } from '../../models/small/data/captions.ts';
import { buildLibrary, rankObjects, rankOf } from '../../models/small/data/nearest.ts';
import { OBJECTS } from '../../models/small/data/objects.ts';
import { compose, type PictureSet, pictureAt, STYLES } from '../../models/small/data/pictures.ts';

const SIZE = 64;
type Shape = (x: number, y: number) => boolean;

/** Shapes on [-1, 1] x [-1, 1]. */
const SHAPES: readonly Shape[] = [
  (x, y) => Math.hypot(x, y) < 0.7,
  (x, y) => Math.max(Math.abs(x), Math.abs(y)) < 0.65,
  (x, y) => y > -0.7 && y < 0.7 && Math.abs(x) < (y + 0.7) / 2,
  (x, y) => Math.abs(Math.hypot(x, y) - 0.6) < 0.15,
  (x, y) => Math.min(Math.abs(x), Math.abs(y)) < 0.15 && Math.max(Math.abs(x), Math.abs(y)) < 0.7,
  (x, y) => Math.abs(x - y) < 0.25 && Math.abs(x) < 0.7,
  (x, y) => Math.abs(y) < 0.25 && Math.abs(x) < 0.8,
  (x, y) => Math.hypot(x - 0.4, y) < 0.3 || Math.hypot(x + 0.4, y) < 0.3,
];
/** One colour for each "style": an object keeps its shape, not its colour. */
const COLOURS = [
  [220, 30, 30],
  [240, 60, 90],
  [250, 220, 40],
  [60, 40, 30],
] as const;

function drawShapes(): PictureSet {
  const rgba = new Uint8Array(SHAPES.length * STYLES.length * SIZE * SIZE * 4);
  const set = { size: SIZE, objects: OBJECTS.slice(0, SHAPES.length), styles: STYLES, rgba };
  SHAPES.forEach((shape, objectIndex) => {
    COLOURS.forEach((colour, styleIndex) => {
      const picture = pictureAt(set, objectIndex, styleIndex);
      for (let p = 0; p < SIZE * SIZE; p++) {
        const x = ((p % SIZE) + 0.5) / (SIZE / 2) - 1;
        const y = (Math.floor(p / SIZE) + 0.5) / (SIZE / 2) - 1;
        if (shape(x, y)) picture.set([...colour, 255], p * 4);
      }
    });
  });
  return set;
}

const set = drawShapes();
const pairsWithout = (style: number) =>
  SHAPES.flatMap((_, objectIndex) =>
    STYLES.flatMap((_, styleIndex) => (styleIndex === style ? [] : [{ objectIndex, styleIndex }])),
  );
const everyPair = pairsWithout(-1);
const teal = BACKGROUNDS.find(({ name }) => name === 'teal')!;
const picture = (objectIndex: number, styleIndex: number, background: Background = teal) =>
  compose(pictureAt(set, objectIndex, styleIndex), background.rgb);

/** Moved right and down by `by` pixels, edges repeated. */
function shift(image: Float32Array, by: number): Float32Array {
  return image.map((_, i) => {
    const x = Math.max(0, (i % SIZE) - by);
    const y = Math.max(0, (Math.floor(i / SIZE) % SIZE) - by);
    return image[Math.floor(i / (SIZE * SIZE)) * SIZE * SIZE + y * SIZE + x]!;
  });
}

/** Numbers in [0, 1), the same each time. */
function generator(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

describe('rankObjects', () => {
  const library = buildLibrary(set, teal, everyPair);

  it('puts a library picture first, at no distance, with its style', () => {
    for (const { objectIndex, styleIndex } of everyPair) {
      const [first] = rankObjects(picture(objectIndex, styleIndex), SIZE, SIZE, library);
      expect(first).toMatchObject({ objectIndex, styleIndex });
      expect(first!.distance).toBeCloseTo(0, 5);
    }
  });

  it('finds it again when shifted, noisy, tinted and at another size', () => {
    const random = generator(1);
    for (let objectIndex = 0; objectIndex < SHAPES.length; objectIndex++) {
      const image = shift(picture(objectIndex, 2), 4).map((value) => 0.9 * value + 0.05 + 0.2 * (random() - 0.5));
      expect(rankOf(objectIndex, rankObjects(image, SIZE, SIZE, library))).toBe(1);
      const half = picture(objectIndex, 2).filter((_, i) => i % 2 === 0 && Math.floor(i / SIZE) % 2 === 0);
      expect(rankOf(objectIndex, rankObjects(half, SIZE / 2, SIZE / 2, library))).toBe(1);
    }
  });

  it('knows an object by its shape where its style is not in the library', () => {
    for (let style = 0; style < STYLES.length; style++) {
      const others = buildLibrary(set, teal, pairsWithout(style));
      for (let objectIndex = 0; objectIndex < SHAPES.length; objectIndex++) {
        expect(rankOf(objectIndex, rankObjects(picture(objectIndex, style), SIZE, SIZE, others))).toBe(1);
      }
    }
  });

  it('lists every object of the library once, and ranks others nowhere', () => {
    const ranking = rankObjects(picture(3, 0), SIZE, SIZE, library);
    expect(ranking.map(({ objectIndex }) => objectIndex).sort()).toEqual(SHAPES.map((_, index) => index));
    expect(rankOf(SHAPES.length, ranking)).toBe(Infinity);
  });

  it('gives a plain picture a finite distance to all', () => {
    const ranking = rankObjects(compose(new Uint8Array(SIZE * SIZE * 4), teal.rgb), SIZE, SIZE, library);
    for (const { distance } of ranking) expect(distance).toSatisfy((value: number) => value > 0.1 && value < 10);
  });
});
