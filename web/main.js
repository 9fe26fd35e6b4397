// The page: parts that each show the latest cluster status.

import { chat } from "./chat.js";
import { pending } from "./pending.js";
import { setup } from "./setup.js";
import { cluster, watch } from "./status.js";

const parts = [cluster(), pending(), setup(), chat()];

watch({
  onStatus: (status) => parts.forEach((part) => part.update(status)),
  onLost: () => parts.forEach((part) => part.lost?.()),
});
