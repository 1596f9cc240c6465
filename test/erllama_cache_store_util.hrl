%% What the tests of the built-in store call it, and what they save.
-define(STORE, store_under_test).
-define(PAYLOAD, <<"the payload">>).
