%% What the suites that run the writer with the fakes of erllama's modules call them by.
-define(WRITER, erllama_cache_writer).
-define(META_SRV, erllama_cache_meta_srv).
-define(DISK_SRV, erllama_cache_disk_srv).
-define(TIER, fake_tier).
-define(LIMIT, 3).
-define(PAYLOAD, <<"a payload">>).
